"""Between API keys, or films and pictures: whoever has used less of the device of late goes first."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

_HALF_LIFE = 10.0  # seconds of the device's work after which what an account has used counts half
_BOUND = 4.0  # most that an account is put before or behind another


class Shares:
    """Device seconds by account, faded by the device's own work."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}

    def charge(self, account: str, seconds: float) -> None:
        """Note what an account's work has cost."""
        fade = 0.5 ** (seconds / _HALF_LIFE)
        self._used = {name: used * fade for name, used in self._used.items() if used * fade > 1e-3}
        self._used[account] = self._used.get(account, 0.0) + seconds

    def used(self, account: str) -> float:
        """Return the seconds that an account has had of late."""
        return self._used.get(account, 0.0)

    def forgo(self, account: str, other: str) -> None:
        """Take from an account what it is behind another one: it was not there to use it."""
        self._used[account] = max(self.used(account), self.used(other))

    def weights(self, waiting: AbstractSet[str]) -> dict[str, float]:
        """Return each waiting account's weight: its fair share over what it has had, at most fourfold."""
        if len(waiting) < 2:
            return dict.fromkeys(waiting, 1.0)
        total = sum(self._used.get(account, 0.0) for account in waiting) + 1e-3 * len(waiting)
        fair = total / len(waiting)
        return {
            account: min(max(fair / (self._used.get(account, 0.0) + 1e-3), 1 / _BOUND), _BOUND) for account in waiting
        }

    def least_served(self, waiting: AbstractSet[str]) -> str:
        """Return whoever of those waiting has had least of the device of late; empty where nobody waits."""
        return min(sorted(waiting), key=lambda name: self._used.get(name, 0.0), default="")
