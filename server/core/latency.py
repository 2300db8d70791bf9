"""What one batch costs at each station: measured, then corrected by what the machine really does.

Both the batch widths and the estimates behind the policy and ``Retry-After`` come from here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from rmd.size import Size

Kind = Literal["encode", "denoise", "decode"]
STUDENT = "student"
TEACHER = "teacher"

MIN_GAIN = 1.10
"""A wider batch must serve at least this many times more rows a second than the narrower one."""

_REMEMBERED = 9  # batches whose median tells how far a station is from its measured latency
_FALLBACK_SECONDS = 0.05


@dataclass(frozen=True)
class StationKey:
    """One station: what is done, with whose weights, at which picture size."""

    kind: Kind
    lane: str = STUDENT
    size: Size | None = None

    @property
    def label(self) -> str:
        """Its name in metrics and replies: ``encode``, ``128x128``, ``teacher 256x256``, ``decode 256x256``."""
        size = "" if self.size is None else str(self.size)
        if self.kind == "denoise":
            return size if self.lane == STUDENT else f"{self.lane} {size}"
        return f"{self.kind} {size}".strip()


class LatencyTable:
    """Seconds of one batch, by station and bucket.

    Args:
        measured: for each station, bucket (rows) -> seconds, from the engines' records or from warm-up.

    Not thread-safe: the executor thread owns it, others only read single floats.
    """

    def __init__(self, measured: Mapping[StationKey, Mapping[int, float]]) -> None:
        self._measured = {key: dict(sorted(buckets.items())) for key, buckets in measured.items() if buckets}
        self._ratios: dict[StationKey, deque[float]] = {}  # real over expected seconds of the latest batches

    def buckets(self, key: StationKey) -> tuple[int, ...]:
        """Return the station's known batch sizes, ascending; (1,) where nothing was measured."""
        return tuple(self._measured.get(key, {1: 0.0}))

    def seconds(self, key: StationKey, rows: int) -> float:
        """Return the expected seconds of one batch of ``rows`` rows."""
        return self._base(key, rows) * median(self._ratios.get(key, (1.0,)))

    def shared(self, key: StationKey, rows: int) -> float:
        """Return the part of ``rows`` rows in the seconds of the bucket that serves most rows a second."""
        return rows * min(self.seconds(key, bucket) / bucket for bucket in self.buckets(key))

    def observe(self, key: StationKey, rows: int, seconds: float) -> None:
        """Correct the station's estimate by one real batch.

        The correction is a median, so that one stalled batch (a page fault, a busy neighbour) moves nothing and a
        lasting change is followed after a few batches.
        """
        if key not in self._measured:
            self._measured[key] = {rows: seconds}
            return
        ratios = self._ratios.setdefault(key, deque([1.0] * _REMEMBERED, maxlen=_REMEMBERED))
        ratios.append(seconds / max(self._base(key, rows), 1e-9))

    def narrow(self, key: StationKey, rows: int) -> None:
        """Forget the buckets of ``rows`` rows and more, which ran out of memory; the smallest bucket stays."""
        buckets = self._measured.get(key, {})
        self._measured[key] = {b: s for b, s in buckets.items() if b < rows} or dict(list(buckets.items())[:1])

    def width(self, key: StationKey) -> int:
        """Return the widest batch (rows) worth waiting entries being served together."""
        return self.best_count(key, [1] * self.buckets(key)[-1])

    def best_count(self, key: StationKey, rows: Sequence[int]) -> int:
        """Return how many of the waiting entries, in this order, to serve in one batch.

        ``rows[i]`` is entry i's number of rows (2 where it is guided). For each bucket, as many entries as fit
        are tried; a larger bucket is taken only where it serves ``MIN_GAIN`` times more entries a second.
        At least one entry is served, even one that is wider than the largest bucket.
        """
        best, best_rate = 1, 1.0 / max(self._base(key, rows[0]), 1e-9)
        for bucket in self.buckets(key):
            count = _fitting(rows, bucket)
            if count <= best:
                continue
            rate = count / max(self._base(key, sum(rows[:count])), 1e-9)
            if rate >= best_rate * MIN_GAIN:
                best, best_rate = count, rate
        return best

    def _base(self, key: StationKey, rows: int) -> float:
        buckets = self._measured.get(key)
        if not buckets:
            return _FALLBACK_SECONDS * rows
        for bucket, seconds in buckets.items():
            if bucket >= rows:
                return seconds
        largest = max(buckets)
        whole, rest = divmod(rows, largest)
        return whole * buckets[largest] + (self._base(key, rest) if rest else 0.0)


def _fitting(rows: Sequence[int], bucket: int) -> int:
    total = 0
    for count, width in enumerate(rows):
        total += width
        if total > bucket:
            return count
    return len(rows)
