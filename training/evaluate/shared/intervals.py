"""Intervals, 95 %: of means by the bootstrap, of shares by the binomial law."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 10_000
_LEVEL = 0.95
_LARGEST_TABLE = 1_000_000  # values drawn at once: 8 MB


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """As reports hold it."""
        return asdict(self)


def bootstrap_mean(values: NDArray[np.float64]) -> Interval:
    """The mean over prompts, with the percentile bootstrap's interval. The same values give the same interval.

    Args:
        values: (N,) one a prompt: a prompt's sampling seeds are averaged first, since more of them do not make up for
            few prompts.

    Raises:
        ValueError: fewer than two prompts.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 prompts; there is {len(values)}")
    at_once = max(1, _LARGEST_TABLE // len(values))
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=_LEVEL, method="percentile", batch=at_once, rng=0
    ).confidence_interval
    return Interval(float(values.mean()), float(found.low), float(found.high))


def binomial(successes: int, trials: int) -> tuple[Interval, float]:
    """A share with its exact (Clopper-Pearson) interval, and the two-sided exact test of its being one half.

    The interval leaves out one half just where the test's p is below .05.

    Raises:
        ValueError: no trials.
    """
    if trials == 0:
        raise ValueError("a share of no trials")
    test = stats.binomtest(successes, trials, 0.5)
    ends = test.proportion_ci(_LEVEL, "exact")
    return Interval(successes / trials, float(ends.low), float(ends.high)), float(test.pvalue)
