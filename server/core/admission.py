"""A permit before any work: the queue is bounded in pictures and in pixels."""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_right, insort
from collections import Counter, deque
from collections.abc import Callable

from server.core.faults import Fault, RequestError

_REMEMBERED = 32  # departures that the drain rate is taken over
_CAUTION = 1.15  # times the expected time: whoever comes too early is refused again
LONGEST_RETRY = 120
"""Seconds; the official client does not come back after longer ones."""


class Permit:
    """The right to occupy ``items`` pictures of the queue; they may leave one by one. Releasing twice is harmless."""

    def __init__(self, admission: Admission, items: int, pixels: int, account: str = "") -> None:
        self._admission = admission
        self.items = items
        self.pixels = pixels
        self.account = account

    def leave(self, finished: bool) -> None:
        """Give one picture's place back; ``finished`` says that it was really made (feeds the drain rate)."""
        self._give_back(min(1, self.items), finished)

    def release(self, finished: bool = False) -> None:
        """Give all places back that are still held."""
        self._give_back(self.items, finished)

    def _give_back(self, items: int, finished: bool) -> None:
        if not items:
            return
        pixels = self.pixels * items // self.items
        self.items -= items
        self.pixels -= pixels
        self._admission._release(self.account, items, pixels, last=not self.items, finished=finished)


class Admission:
    """Counts what is admitted and refuses what does not fit.

    Whoever is refused is told a time of its own at which there will be room: a crowd that is told one time comes back
    as a crowd, and all but the first few are refused again.

    Args:
        max_items: pictures at once.
        max_pixels: their pixels at full size; a single request is let in whatever its size when nothing else is.
        seconds_per_item: first guess of the drain rate, until real completions are seen.
        share: of the places that one account may hold while others are known.
    """

    def __init__(
        self,
        max_items: int,
        max_pixels: int,
        seconds_per_item: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        share: float = 1.0,
    ) -> None:
        self.max_items = max_items
        self.max_pixels = max_pixels
        self._seconds_per_item = seconds_per_item
        self._clock = clock
        self._share = share
        self._lock = threading.Lock()
        self._items = 0
        self._pixels = 0
        self._requests = 0
        self._held: Counter[str] = Counter()
        self._promised: list[float] = []  # when a picture was told to come back, sorted
        self._last_finish = clock()
        self._finishes: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)  # seconds since the one before, pictures
        self._idle = threading.Event()
        self._idle.set()

    @property
    def items(self) -> int:
        """Pictures admitted and not yet done."""
        return self._items

    @property
    def requests(self) -> int:
        """Requests admitted and not yet done."""
        return self._requests

    def expect(self, seconds_per_item: float) -> None:
        """Replace the first guess of the drain rate, once latencies are known."""
        self._seconds_per_item = max(seconds_per_item, 1e-4)

    def acquire(self, items: int, pixels: int, account: str = "") -> Permit:
        """Return a permit for ``items`` pictures of ``pixels`` pixels in all.

        Raises:
            RequestError: 429 with ``Retry-After`` where the queue is full, or the account's share of it.
        """
        with self._lock:
            full = self._items + items > self.max_items or self._pixels + pixels > self.max_pixels
            if full and self._items:
                raise RequestError(
                    Fault.QUEUE_FULL,
                    f"The queue is full ({self._items} of {self.max_items} pictures, {self._pixels / 1e6:.1f} of "
                    f"{self.max_pixels / 1e6:.1f} megapixels); "
                    "try again after the seconds in Retry-After.",
                    retry_after=self._promise(items, pixels),
                )
            own = self._held[account]
            if own and own + items > self._share * self.max_items:
                raise RequestError(
                    Fault.QUEUE_FULL,
                    f"This API key has {own} pictures in the queue, and may have {int(self._share * self.max_items)}; "
                    "try again after the seconds in Retry-After.",
                    code="key_share_used",
                    retry_after=self._promise(items, pixels),
                )
            if self._items == 0:
                self._last_finish = self._clock()
            self._items += items
            self._pixels += pixels
            self._requests += 1
            self._held[account] += items
            self._idle.clear()
            return Permit(self, items, pixels, account)

    @property
    def full(self) -> bool:
        """Whether no place is free."""
        return self._items >= self.max_items

    def wait_idle(self, timeout: float) -> bool:
        """Block until nothing is admitted; False where ``timeout`` seconds passed first."""
        return self._idle.wait(timeout)

    def retry_after(self, items: int, pixels: int, least: float = 0.0) -> int:
        """Return whole seconds until ``items`` pictures have a chance, ``least`` at least, and remember the promise."""
        with self._lock:
            return self._promise(items, pixels, least)

    def _promise(self, items: int, pixels: int, least: float = 0.0) -> int:
        """Whole seconds until enough places are free, and those are who were promised places before."""
        now = self._clock()
        del self._promised[: bisect_right(self._promised, now)]
        mean_pixels = max(self._pixels / max(self._items, 1), 1.0)
        excess = max(
            self._items + items - self.max_items,
            (self._pixels + pixels - self.max_pixels) / mean_pixels,
            1,
        )
        seconds = max(math.ceil(least), 1)
        while seconds < LONGEST_RETRY:  # later means behind more of those who were told a time
            before = bisect_right(self._promised, now + seconds)
            needed = math.ceil((excess + before) * self._seconds_per_item * _CAUTION)
            if needed <= seconds:
                break
            seconds = needed
        seconds = min(seconds, LONGEST_RETRY)
        for _ in range(items):
            insort(self._promised, now + seconds)
        return seconds

    def _release(self, account: str, items: int, pixels: int, last: bool, finished: bool) -> None:
        with self._lock:
            now = self._clock()
            self._items -= items
            self._pixels -= pixels
            self._requests -= last
            self._held[account] -= items
            if self._held[account] <= 0:
                del self._held[account]
            if finished:
                # A sum over many: pictures leave in batches, several at one moment and then none for a while.
                self._finishes.append((now - self._last_finish, items))
                seconds, made = (sum(column) for column in zip(*self._finishes, strict=True))
                self._seconds_per_item = max(seconds / made, 1e-4)
                self._last_finish = now
            if self._items == 0:
                self._idle.set()
