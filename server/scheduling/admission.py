"""A permit before any work: the queue is bounded in pictures and in pixels."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from server.errors import ApiError, Fault

_SMOOTHING = 0.2
_LONGEST_RETRY = 600


class Permit:
    """The right to occupy ``items`` pictures of the queue. Releasing twice is harmless."""

    def __init__(self, admission: Admission, items: int, pixels: int) -> None:
        self._admission: Admission | None = admission
        self.items = items
        self.pixels = pixels

    def release(self, finished: bool = False) -> None:
        """Give the places back; ``finished`` says that the pictures were really made (feeds the drain rate)."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._release(self, finished)


class Admission:
    """Counts what is admitted and refuses what does not fit.

    Args:
        max_items: pictures at once.
        max_pixels: their pixels at full size; a single request is let in whatever its size when nothing else is.
        seconds_per_item: first guess of the drain rate, until real completions are seen.
    """

    def __init__(
        self,
        max_items: int,
        max_pixels: int,
        seconds_per_item: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_items = max_items
        self.max_pixels = max_pixels
        self._seconds_per_item = seconds_per_item
        self._clock = clock
        self._lock = threading.Lock()
        self._items = 0
        self._pixels = 0
        self._requests = 0
        self._last_finish = clock()
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

    def acquire(self, items: int, pixels: int) -> Permit:
        """Return a permit for ``items`` pictures of ``pixels`` pixels in all.

        Raises:
            ApiError: 429 with ``Retry-After`` where the queue is full.
        """
        with self._lock:
            full = self._items + items > self.max_items or self._pixels + pixels > self.max_pixels
            if full and self._items:
                raise ApiError(
                    Fault.QUEUE_FULL,
                    f"The queue is full ({self._items} of {self.max_items} pictures); "
                    "try again after the seconds in Retry-After.",
                    retry_after=self._retry_after(items, pixels),
                )
            if self._items == 0:
                self._last_finish = self._clock()
            self._items += items
            self._pixels += pixels
            self._requests += 1
            self._idle.clear()
            return Permit(self, items, pixels)

    def wait_idle(self, timeout: float) -> bool:
        """Block until nothing is admitted; False where ``timeout`` seconds passed first."""
        return self._idle.wait(timeout)

    def _retry_after(self, items: int, pixels: int) -> int:
        """Whole seconds until enough places are free at the present drain rate."""
        mean_pixels = max(self._pixels / max(self._items, 1), 1.0)
        excess = max(
            self._items + items - self.max_items,
            (self._pixels + pixels - self.max_pixels) / mean_pixels,
            1,
        )
        return min(max(math.ceil(excess * self._seconds_per_item), 1), _LONGEST_RETRY)

    def _release(self, permit: Permit, finished: bool) -> None:
        with self._lock:
            now = self._clock()
            self._items -= permit.items
            self._pixels -= permit.pixels
            self._requests -= 1
            if finished:
                seconds = (now - self._last_finish) / permit.items
                self._seconds_per_item += _SMOOTHING * (seconds - self._seconds_per_item)
                self._last_finish = now
            if self._items == 0:
                self._idle.set()
