"""When to come back: whoever is refused is told a time of its own.

A crowd that is told one time comes back as a crowd, and all but the first few are refused again.
"""

from __future__ import annotations

import math
import random
import threading
import time
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable

LONGEST_RETRY = 120
"""Seconds; the official client does not come back after longer ones."""
_REMEMBERED = 32  # departures that the drain rate is taken over
_CAUTION = 1.15  # times the expected time: whoever comes too early is refused again


class Promises:
    """Times at which there will be room in one queue, by the rate at which it drains. Used from any thread.

    Args:
        seconds_per_item: first guess of that rate, until real completions are seen.
    """

    def __init__(self, seconds_per_item: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds_per_item = seconds_per_item
        self._clock = clock
        self._lock = threading.Lock()
        self._promised: list[float] = []  # when an item was told to come back, sorted
        self._last_finish = clock()
        self._finishes: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)  # seconds since the one before, items

    def expect(self, seconds_per_item: float) -> None:
        """Replace the first guess, once latencies are known."""
        self._seconds_per_item = max(seconds_per_item, 1e-4)

    def begin(self) -> None:
        """Note that there is something to do again, after there was nothing."""
        with self._lock:
            self._last_finish = self._clock()

    def finished(self, items: int) -> None:
        """Note that so many were made."""
        with self._lock:
            now = self._clock()
            # A sum over many: items leave in batches, several at one moment and then none for a while.
            self._finishes.append((now - self._last_finish, items))
            seconds, made = (sum(column) for column in zip(*self._finishes, strict=True))
            self._seconds_per_item = max(seconds / made, 1e-4)
            self._last_finish = now

    def make(self, excess: float, items: int, least: float = 0.0) -> int:
        """Return whole seconds until enough places are free, and those are who were promised places before.

        Where that is longer than clients wait, nothing can be promised, and they are only kept from coming at once.

        Args:
            excess: items that must leave first.
            items: that are to come.
            least: seconds.
        """
        with self._lock:
            now = self._clock()
            del self._promised[: bisect_right(self._promised, now)]
            seconds = max(math.ceil(least), 1)
            while seconds <= LONGEST_RETRY:  # later means behind more of those who were told a time
                before = bisect_right(self._promised, now + seconds)
                needed = math.ceil((excess + before) * self._seconds_per_item * _CAUTION)
                if needed <= seconds:
                    break
                seconds = needed
            if seconds > LONGEST_RETRY:
                seconds = random.randint(LONGEST_RETRY // 2, LONGEST_RETRY)
            for _ in range(items):
                insort(self._promised, now + seconds)
            return seconds


def in_a_while(seconds: int) -> int:
    """Return so many seconds, or up to twice as many: for all who are told at once that something is away."""
    return random.randint(seconds, 2 * seconds)
