"""Differences between two rows, paired by picture, sampling seed and training seed.

The bootstrap draws training seeds and, inside them all alike, concepts: a concept's pictures in several styles are hit
or missed together, and a hard concept is hard for both rows. With one training seed it draws concepts alone, which says
nothing about another training run; the result says how many seeds it rests on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 4000


@dataclass(frozen=True)
class Difference:
    """Of a mean, first row minus second.

    Attributes:
        value: the difference.
        low, high: the 95 % interval.
        seeds: training seeds that both rows have.
    """

    value: float
    low: float
    high: float
    seeds: int

    @property
    def seen(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def paired_difference(
    first: Mapping[int, Tensor],
    second: Mapping[int, Tensor],
    concepts: Tensor,
    *,
    untrained: bool = False,
    seed: int = 0,
) -> Difference | None:
    """The difference of two rows' means with its bootstrap interval.

    Args:
        first, second: by training seed, (N,) values of the same pictures, averaged over sampling seeds.
        concepts: (N,) the concept of each picture.
        untrained: one of them, such as the teacher, is the same for every training seed, and stands against each of the
            other's.
        seed: of the resampling.

    Returns:
        None when they have no training seed in common.
    """
    pairs = _pairs(first, second, untrained)
    if not pairs:
        return None
    table = torch.stack([a.double() - b.double() for a, b in pairs])
    _, column = torch.unique(concepts, return_inverse=True)
    count = int(column.max()) + 1
    sums = torch.zeros(len(table), count, dtype=torch.float64).index_add(1, column, table)
    sizes = torch.zeros(count, dtype=torch.float64).index_add(0, column, torch.ones(len(column), dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    weights = _counts(torch.randint(count, (RESAMPLES, count), generator=generator), count)
    runs = _counts(torch.randint(len(table), (RESAMPLES, len(table)), generator=generator), len(table)) / len(table)
    drawn = ((runs @ sums) * weights).sum(1) / (weights @ sizes)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(float(table.mean()), low, high, len(table))


def _pairs(first: Mapping[int, Tensor], second: Mapping[int, Tensor], untrained: bool) -> list[tuple[Tensor, Tensor]]:
    if untrained:
        return [(a, b) for a in first.values() for b in second.values()]
    return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]


def _counts(drawn: Tensor, count: int) -> Tensor:
    """(R, K) indices -> (R, count) how often each was drawn."""
    zeros = torch.zeros(len(drawn), count, dtype=torch.float64)
    return zeros.scatter_add(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation over training seeds; None of one."""
    return float(torch.tensor(values, dtype=torch.float64).std(correction=1)) if len(values) > 1 else None
