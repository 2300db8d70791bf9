"""What one batch costs at each station: timed at start, then learnt from the batches that are really run.

Batch widths, the policy's estimates, admission and ``Retry-After`` all come from here: there is no other model of cost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

from server.core.stations import StationKey
from server.core.widths import WidthCosts

MIN_GAIN = 1.02
"""A wider batch must serve at least this many times more rows a second than the narrower one."""

_REMEMBERED = 15  # batches of one width, whose median is its base: one stalled batch moves nothing
_BELIEVED = 3  # of them is the first timing worth, until so many are remembered
_MOODS, _LEAST_MOODS = 31, 5  # batches of any kind that tell a mood
_FALLBACK_SECONDS = 0.05
_DOUBTED_AFTER = 512  # batches of a station: a width that did not run among them is hoped to cost half as much


class CostTable:
    """Seconds of one batch, by station and width (rows).

    A machine's speed drifts, for all stations alike. So a batch costs its width's *base* times the *mood* of the other
    stations' latest batches, which is how far they were from their first timings. A base is the median of the width's
    first timing and its latest batches, each over the mood it met. Otherwise the widths that ran in good hours would
    win for ever over those that ran in bad ones and are not run again.

    Which width is the better is another question: see :mod:`server.core.widths`.

    Args:
        measured: for each station, width -> seconds.

    One thread learns; others may ask meanwhile.
    """

    def __init__(self, measured: Mapping[StationKey, Mapping[int, float]]) -> None:
        self._first: dict[StationKey, dict[int, float]] = {}
        self._opened: dict[tuple[StationKey, int], float] = {}  # the first timing over the mood it met
        self._latest: dict[tuple[StationKey, int], deque[float]] = {}
        self._bases: dict[tuple[StationKey, int], float] = {}  # the medians of these
        self._widths: dict[StationKey, WidthCosts] = {}
        self._ratios: deque[tuple[int, float]] = deque(maxlen=_MOODS)  # of which station, by its key's hash
        self._moods: dict[StationKey, float] = {}
        self._batches: dict[StationKey, int] = {}
        self._ran: dict[tuple[StationKey, int], int] = {}  # how many these were when a width last ran
        for key, widths in measured.items():
            self.replace(key, widths)

    def replace(self, key: StationKey, widths: Mapping[int, float]) -> None:
        """Forget what a station cost, since it runs on something else now."""
        for width in self._first.get(key, {}):
            for known in (self._latest, self._bases, self._opened, self._ran):
                known.pop((key, width), None)
        for width, seconds in widths.items():
            self._opened[key, width] = seconds / self._mood(key)
        if widths:  # at once: others read meanwhile
            self._widths[key] = WidthCosts({width: self._opened[key, width] for width in widths})
            self._first[key] = dict(sorted(widths.items()))
        else:
            self._first.pop(key, None)
            self._widths.pop(key, None)

    def table(self) -> dict[StationKey, dict[int, float]]:
        """Return the present estimates."""
        return {key: {width: self.seconds(key, width) for width in widths} for key, widths in self._first.items()}

    def widths(self, key: StationKey) -> tuple[int, ...]:
        """Return the station's known widths, ascending; (1,) where nothing was measured."""
        return tuple(self._first.get(key, {1: 0.0}))

    def seconds(self, key: StationKey, rows: int) -> float:
        """Return the expected seconds of one batch of ``rows`` rows, which runs at the next width that holds them."""
        widths = self._first.get(key)
        if not widths:
            return _FALLBACK_SECONDS * rows
        for width in widths:
            if width >= rows:
                return self._of_width(key, width)
        largest = max(widths)
        whole, rest = divmod(rows, largest)
        return whole * self._of_width(key, largest) + (self.seconds(key, rest) if rest else 0.0)

    def first(self, key: StationKey, rows: int) -> float:
        """Return what ``rows`` rows cost in the widest batch's company when the station was opened.

        For what may not hang on the machine's present mood, such as refusing a request for good.
        """
        widths = self._first.get(key, {1: _FALLBACK_SECONDS})
        return rows * min(seconds / width for width, seconds in widths.items())

    def shared(self, key: StationKey, rows: int) -> float:
        """Return the part of ``rows`` rows in the seconds of the width that serves most rows a second."""
        return rows * min(self.seconds(key, width) / width for width in self.widths(key))

    def observe(self, key: StationKey, rows: int, seconds: float) -> None:
        """Learn from one real batch of ``rows`` rows."""
        if key not in self._first:
            self.replace(key, {rows: seconds})
        widths = self._first[key]
        width = next((width for width in widths if width >= rows), None)
        if width is None:
            return
        opened = self._opened.setdefault((key, width), widths[width] / self._mood(key))
        latest = self._latest.setdefault((key, width), deque([opened], maxlen=_REMEMBERED))
        latest.append(seconds / self._mood(key))
        more = [opened] * (_BELIEVED - 1) if len(latest) < _REMEMBERED else []
        self._bases[key, width] = median([*latest, *more])
        self._ratios.append((hash(key), seconds / max(opened, 1e-9)))
        self._moods.clear()
        self._batches[key] = self._ran[key, width] = self._batches.get(key, 0) + 1
        self._widths[key].observe(width, seconds / self._mood(key))

    def narrow(self, key: StationKey, rows: int) -> None:
        """Forget the widths of ``rows`` rows and more, which ran out of memory; the smallest stays."""
        widths = self._first.get(key, {})
        self._first[key] = {w: s for w, s in widths.items() if w < rows} or dict(list(widths.items())[:1])

    def widest(self, key: StationKey) -> int:
        """Return the widest batch (rows) worth waiting entries being served together."""
        return self.best_count(key, [1] * self.widths(key)[-1])

    def best_count(self, key: StationKey, rows: Sequence[int]) -> int:
        """Return how many of the waiting tickets, in this order, to serve in one batch: the most a second.

        ``rows[i]`` is ticket i's number of rows (2 where it is guided). A larger width is taken only where it serves
        ``MIN_GAIN`` times more tickets a second. At least one ticket is served, even one that is wider than any width.
        """
        best, best_rate = 1, 0.0
        for count, seconds in self.offers(key, rows):
            rate = count / max(seconds, 1e-9)
            if rate >= best_rate * MIN_GAIN:
                best, best_rate = count, rate
        return best

    def offers(self, key: StationKey, rows: Sequence[int]) -> list[tuple[int, float]]:
        """Return what batches can be made of the waiting tickets, in this order: (tickets, hoped seconds), ascending.

        The first is one ticket's; then one for each width that holds more.
        """
        offers = [(1, self.hoped(key, rows[0]))]
        for width in self.widths(key):
            count = _fitting(rows, width)
            if count > offers[-1][0]:
                offers.append((count, self.hoped(key, sum(rows[:count]))))
        return offers

    def hoped(self, key: StationKey, rows: int) -> float:
        """Return what one batch of ``rows`` rows may cost, for choosing between widths.

        The longer a width has not run, the less is known of it, and the better it is hoped to be: so that each is tried
        again, soon where it looks little worse than the best and seldom where it looks much worse.
        """
        width = next((width for width in self.widths(key) if width >= rows), None)
        known = self._widths.get(key)
        if width is None or known is None:
            return self.seconds(key, rows)
        missed = self._batches.get(key, 0) - self._ran.get((key, width), 0)
        return known.seconds(width) / (1 + missed / _DOUBTED_AFTER)

    def _of_width(self, key: StationKey, width: int) -> float:
        base = self._bases.get((key, width))
        if base is None:
            base = self._opened.get((key, width))
        return _FALLBACK_SECONDS * width if base is None else base * self._mood(key)

    def _mood(self, key: StationKey) -> float:
        """How far the other stations' latest batches were from their first timings; 1 where few are known."""
        mood = self._moods.get(key)
        if mood is None:
            own = hash(key)
            # A copy: the front's other threads ask while one learns, and a deque that changes cannot be walked through.
            others = [ratio for station, ratio in tuple(self._ratios) if station != own]
            mood = self._moods[key] = median(others) if len(others) >= _LEAST_MOODS else 1.0
        return mood


class JoinedCosts(CostTable):
    """What batches cost at stations that are on different engines: each as the first that has it knows.

    Args:
        tables: of engines, at least one.
    """

    def __init__(self, tables: Sequence[CostTable]) -> None:
        super().__init__({})
        self._tables = tables

    def _of(self, key: StationKey) -> CostTable:
        return next((table for table in self._tables if key in table._first), self._tables[0])

    def widths(self, key: StationKey) -> tuple[int, ...]:
        """See :class:`CostTable`."""
        return self._of(key).widths(key)

    def seconds(self, key: StationKey, rows: int) -> float:
        """See :class:`CostTable`."""
        return self._of(key).seconds(key, rows)

    def first(self, key: StationKey, rows: int) -> float:
        """See :class:`CostTable`."""
        return self._of(key).first(key, rows)

    def widest(self, key: StationKey) -> int:
        """See :class:`CostTable`."""
        return self._of(key).widest(key)


def _fitting(rows: Sequence[int], width: int) -> int:
    total = 0
    for count, more in enumerate(rows):
        total += more
        if total > width:
            return count
    return len(rows)
