"""The batches that an engine runs, as its messages tell: one, or on a CPU one on each of its tracks."""

from __future__ import annotations

import time

from server.core.messages import Began, Ended, Message


class Running:
    """See the module."""

    def __init__(self) -> None:
        self._batches: dict[int, tuple[Began, float]] = {}

    def note(self, message: Message) -> Began | None:
        """Take in what an engine said; where that is the end of a batch, return how it began."""
        if isinstance(message, Began):
            self._batches[message.batch] = message, time.monotonic()
        elif isinstance(message, Ended):
            return self._batches.pop(message.batch, (None, 0.0))[0]
        return None

    def forgive(self, seconds: float) -> None:
        """The whole machine stood still for so long."""
        self._batches = {number: (began, since + seconds) for number, (began, since) in self._batches.items()}

    def clear(self) -> None:
        """The engine has ended."""
        self._batches = {}

    @property
    def batches(self) -> tuple[Began, ...]:
        """Those that run, the oldest first."""
        return tuple(began for began, _ in self._batches.values())

    @property
    def oldest(self) -> tuple[Began, float] | None:
        """The one that has run longest, and for how many seconds; None where none runs."""
        first = next(iter(self._batches.values()), None)
        return None if first is None else (first[0], time.monotonic() - first[1])

    def hung(self, least: float, factor: float) -> str:
        """Return which took more than ``least`` seconds and ``factor`` times what it should; nothing where none did."""
        for began, since in self._batches.values():
            took = time.monotonic() - since
            if took > max(least, factor * began.expected):
                return f"a batch at {began.key.label} took {took:.0f} s"
        return ""
