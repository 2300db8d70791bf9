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
_REMEMBERED = 32  # departures that the drain rate is taken over; those not yet seen are as the first guess has them
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
        self._last_finish: float | None = None  # nothing is under way
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
            self._finishes.append((self._waited(now), items))
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
            seconds_per_item = self._drain(now)
            seconds = max(math.ceil(least), 1)
            while seconds <= LONGEST_RETRY:  # later means behind more of those who were told a time
                before = bisect_right(self._promised, now + seconds)
                needed = math.ceil((excess + before) * seconds_per_item * _CAUTION)
                if needed <= seconds:
                    break
                seconds = needed
            if seconds > LONGEST_RETRY:
                seconds = random.randint(LONGEST_RETRY // 2, LONGEST_RETRY)
            for _ in range(items):
                insort(self._promised, now + seconds)
            return seconds

    def _drain(self, now: float) -> float:
        """Seconds an item, by the latest departures and the one that is being waited for.

        A sum over many: items leave in batches, several at one moment and then none for a while. And the first of all
        comes late, since it has every stage before it, which says little of those behind it.
        """
        made = sum(items for _, items in self._finishes)
        guessed = max(_REMEMBERED - made, 0)
        seconds = sum(seconds for seconds, _ in self._finishes) + guessed * self._seconds_per_item
        return max((seconds + self._waited(now)) / (made + guessed), 1e-4)

    def _waited(self, now: float) -> float:
        return 0.0 if self._last_finish is None else now - self._last_finish


def in_a_while(seconds: int) -> int:
    """Return so many seconds, or up to twice as many: for all who are told at once that something is away."""
    return random.randint(seconds, 2 * seconds)
