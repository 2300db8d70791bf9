"""What one caller may ask for: so many requests in a time, and so many at once."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from limits import RateLimitItem, parse_many
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from server.core.faults import Fault, RequestError
from server.core.promises import Promises
from server.front.auth import Caller


def parse_rates(text: str) -> list[RateLimitItem]:
    """Return rates such as "60/minute; 500/hour".

    Raises:
        ValueError: it is none.
    """
    try:
        rates: list[RateLimitItem] = parse_many(text)
    except ValueError:
        raise ValueError(f"{text!r} is no rate; write one such as 60/minute, or several with ';'") from None
    return rates


class Quotas:
    """Counts the requests for pictures and films of each caller. Lives on one event loop.

    Args:
        rate: such as "60/minute"; None for none.
        together: requests that one caller may have open; None for any number.
    """

    def __init__(self, rate: str | None, together: int | None) -> None:
        self._rates = parse_rates(rate) if rate else []
        self._limiter = MovingWindowRateLimiter(MemoryStorage()) if self._rates else None
        self._together = together
        self._open: Counter[str] = Counter()
        self._promises: dict[tuple[str, str], Promises] = {}  # by caller, and by what it has no more of

    @contextmanager
    def request(self, caller: Caller) -> Iterator[None]:
        """Count one request while it lasts.

        Raises:
            RequestError: 429 where the caller has no more left; such a request is not counted.
        """
        who = caller.account
        if self._together is not None and self._open[who] >= self._together:
            raise RequestError(
                Fault.QUEUE_FULL,
                f"This API key has {self._open[who]} requests under way, and may have {self._together}; "
                "wait for one of them to end.",
                code="key_busy",
                retry_after=self._promised(who, "together").make(1, 1),
            )
        self._spend(who)
        if not self._open[who]:
            self._promised(who, "together").begin()
        self._open[who] += 1
        try:
            yield
            self._promised(who, "together").finished(1)  # one that was refused tells nothing
        finally:
            self._open[who] -= 1
            if not self._open[who]:
                del self._open[who]

    def _spend(self, who: str) -> None:
        if self._limiter is None:
            return
        for rate in self._rates:
            if not self._limiter.test(rate, who):
                wait = math.ceil(self._limiter.get_window_stats(rate, who).reset_time - time.time())
                raise RequestError(
                    Fault.QUEUE_FULL,
                    f"This API key may send {rate}; try again after the seconds in Retry-After.",
                    code="rate_limit_exceeded",
                    retry_after=self._promised(who, str(rate), rate.get_expiry() / rate.amount).make(1, 1, wait),
                )
        for rate in self._rates:
            self._limiter.hit(rate, who)

    def _promised(self, who: str, what: str, seconds: float = 1.0) -> Promises:
        return self._promises.setdefault((who, what), Promises(seconds))
