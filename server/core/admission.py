"""A permit before any work: the queue is bounded in pictures and in pixels."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

from server.core.faults import Fault, RequestError
from server.core.promises import Promises


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
    """Counts what is admitted and refuses what does not fit, each until a time of its own.

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
        self._promises = Promises(seconds_per_item, clock)
        self._share = share
        self._lock = threading.Lock()
        self._items = 0
        self._pixels = 0
        self._requests = 0
        self._held: Counter[str] = Counter()
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
        self._promises.expect(seconds_per_item)

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
                self._promises.begin()
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
        mean_pixels = max(self._pixels / max(self._items, 1), 1.0)
        excess = max(
            self._items + items - self.max_items,
            (self._pixels + pixels - self.max_pixels) / mean_pixels,
            1,
        )
        # For when the queue is expected half empty: early enough for it never to run dry, late enough for a machine
        # that turns out half as fast, since official clients come three times in all.
        return self._promises.make(excess + self._items // 2, items, least)

    def _release(self, account: str, items: int, pixels: int, last: bool, finished: bool) -> None:
        with self._lock:
            self._items -= items
            self._pixels -= pixels
            self._requests -= last
            self._held[account] -= items
            if self._held[account] <= 0:
                del self._held[account]
            if finished:
                self._promises.finished(items)
            if self._items == 0:
                self._idle.set()
