"""Which of a station's widths serves most rows a second, on a machine whose speed drifts.

A batch's seconds are taken to be *cost of its width* x *level of the station* x noise. The level wanders from batch to
batch as the machine does: other tenants, clocks, heat. Costs hardly do. So two widths are compared by what they took
one after the other, not by what each took in its own hour: otherwise the width that happened to run in a bad hour is
left for one that is a fifth dearer, until the hours have changed.

Both are estimated together by a Kalman filter (a dynamic linear model; West and Harrison, Bayesian Forecasting and
Dynamic Models, 1997) on the relative error of each batch. It shares an error out between the batch's width and the
level by how little is known of either, and remembers how the two hang together.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# Standard deviations, relative.
_FIRST_COST = 0.15  # of a width's first timing: of warm caches, and of one moment
_FIRST_LEVEL = 0.07  # of real batches to first timings, in the same mood of the machine
_NOISE = 0.35  # of one row's batch; whatever else the cores do is shared out over a longer batch
_DRIFT = 0.02  # of the level, from one batch of the station to the next
_WEAR = 0.006  # of each cost, likewise: what has not run for long is believed at once when it does
_STALLED = 3.0  # times what was expected: what took longer counts as that
_YOUNG = 3  # a width's first batches: where all are slow, only the quickest of so many is believed


class WidthCosts:
    """See the module. Of one station.

    Args:
        first: width -> seconds, timed when the station was opened.
    """

    def __init__(self, first: Mapping[int, float]) -> None:
        self._places = {width: place for place, width in enumerate(first)}
        self._costs = np.array(list(first.values()))
        self._level = 1.0
        # Of the relative errors of the costs and, last, of the level.
        self._covariance = np.diag([*([_FIRST_COST**2] * len(first)), _FIRST_LEVEL**2])
        self._growth = np.diag([*([_WEAR**2] * len(first)), _DRIFT**2])
        self._slow: dict[int, list[float]] = {width: [] for width in first}

    def seconds(self, width: int) -> float:
        """Return what a batch of a width takes at the station's present level."""
        return float(self._costs[self._places[width]]) * self._level

    def observe(self, width: int, seconds: float) -> None:
        """Learn from one real batch."""
        slow = self._slow.get(width)
        if slow is not None:
            slow.append(seconds)
            if seconds > self.seconds(width) and len(slow) < _YOUNG:
                return
            del self._slow[width]
            seconds = min(slow)
        self._learn(width, seconds)

    def _learn(self, width: int, seconds: float) -> None:
        place, known = self._places[width], self._covariance + self._growth
        error = min(seconds / max(self.seconds(width), 1e-9), _STALLED) - 1.0
        shared = known[:, place] + known[:, -1]
        gains = shared / (shared[place] + shared[-1] + _NOISE**2 / width**0.5)
        self._covariance = known - np.outer(gains, shared)
        factors = np.maximum(1.0 + gains * error, 0.1)
        self._costs, self._level = self._costs * factors[:-1], self._level * float(factors[-1])
