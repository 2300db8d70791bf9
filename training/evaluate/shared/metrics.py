"""Distances between two sets of features, and retrieval. All on EfficientNet-Lite0 features here, so never called FID.

The kernel distance's estimate is unbiased, the Frechet distance's is not: it grows as the sets get smaller, so it is
only to be compared between rows of the same size, and stands beside a real-against-real floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number with its standard deviation: over subsets, over sampling seeds, or binomial; the field says which."""

    value: float
    deviation: float
    over: str

    def to_dict(self) -> dict[str, Any]:
        """As written to ``quality.json``."""
        return asdict(self)


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """``(x . y / d + 1) ** 3`` for all pairs: (N, d) and (M, d) -> (N, M), float64."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy under :func:`polynomial_kernel`.

    Args:
        x: (N, d) features, N at least 2.
        y: (M, d) features, M at least 2.

    Returns:
        zero in expectation for samples of one distribution; it may be negative.

    Raises:
        ValueError: too few rows or different widths.
    """
    n, m = _checked(x, y)
    k_xx, k_yy = polynomial_kernel(x, x), polynomial_kernel(y, y)
    within_x = (k_xx.sum() - k_xx.diagonal().sum()) / (n * (n - 1))
    within_y = (k_yy.sum() - k_yy.diagonal().sum()) / (m * (m - 1))
    return float(within_x + within_y - 2 * polynomial_kernel(x, y).mean())


def kid(x: Tensor, y: Tensor, subsets: int = 50, subset_size: int = 256, seed: int = 0) -> Estimate:
    """Kernel distance x 1000: mean and standard deviation over random subsets (drawn without replacement).

    Args:
        x, y: (N, d) and (M, d) features.
        subsets: how many.
        subset_size: rows of each; at most half of the smaller set (its whole when that is under 4), so that subsets
            differ.
        seed: of the draw.
    """
    n, m = _checked(x, y)
    smaller = min(n, m)
    size = min(subset_size, smaller if smaller < 4 else max(2, smaller // 2))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        rows = torch.randperm(n, generator=generator)[:size]
        columns = torch.randperm(m, generator=generator)[:size]
        values.append(1000 * kernel_distance(x[rows], y[columns]))
    drawn = torch.tensor(values, dtype=torch.float64)
    # The mean over all rows is the better estimate of the value; the subsets tell how far it may be off.
    return Estimate(1000 * kernel_distance(x, y), float(drawn.std(correction=0)), f"{subsets} subsets of {size}")


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """``|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))`` of Gaussians fitted to two sets of features.

    With centred rows A (N, d) and B (M, d) scaled to ``C_x = A^T A``, ``C_y = B^T B``, the trace of the square root is
    the nuclear norm of ``A B^T``: exact for singular covariances too, which fewer rows than features always give.

    Raises:
        ValueError: too few rows or different widths.
    """
    n, m = _checked(x, y)
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    a, b = (x - mean_x) / math.sqrt(n - 1), (y - mean_y) / math.sqrt(m - 1)
    cross = torch.linalg.svdvals(_reduced(a) @ _reduced(b).T).sum()
    return float((mean_x - mean_y).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def _reduced(rows: Tensor) -> Tensor:
    """Rows with the same ``rows^T rows``, at most as many as there are columns."""
    return torch.linalg.qr(rows, mode="r").R if rows.shape[0] > rows.shape[1] else rows


def _checked(x: Tensor, y: Tensor) -> tuple[int, int]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features of shapes {tuple(x.shape)} and {tuple(y.shape)} cannot be compared")
    if min(x.shape[0], y.shape[0]) < 2:
        raise ValueError("a distance between sets needs at least 2 pictures in each; raise --limit")
    return x.shape[0], y.shape[0]


def unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to length 1, float32."""
    return torch.nn.functional.normalize(x.float(), dim=-1)


def ranks_of_target(scores: Tensor, targets: Sequence[int] | Tensor) -> Tensor:
    """Where each row's target stands: 0 is first. Ties count half, so that constant scores rank in the middle.

    Args:
        scores: (N, G), larger is nearer; -inf takes an entry out of the row's gallery.
        targets: N columns.
    """
    target = scores.gather(1, torch.as_tensor(targets, dtype=torch.int64)[:, None])
    above = (scores > target).sum(1).double()
    ties = (scores == target).sum(1).double() - 1
    return above + ties / 2


def recall_at(k: int, ranks: Tensor) -> float:
    """The share of rows whose target is among the first ``k``."""
    return float((ranks < k).double().mean())


def recall(ranks: Sequence[Tensor], k: int, concepts: Tensor) -> Estimate:
    """Recall at ``k``, averaged over sampling seeds.

    Args:
        ranks: one tensor (N,) a seed, in the same order of prompts.
        concepts: (N,) the concept of each prompt.
    """
    return mean_over_concepts([(seed < k).double() for seed in ranks], concepts)


def log_rank(ranks: Sequence[Tensor], concepts: Tensor) -> Estimate:
    """Mean log2(1 + rank) of the target, 0 is best: it tells rows apart whose recalls differ by chance.

    Args:
        ranks, concepts: as of :func:`recall`.
    """
    return mean_over_concepts([torch.log2(1 + seed.double()) for seed in ranks], concepts)


def mean_over_concepts(values: Sequence[Tensor], concepts: Tensor) -> Estimate:
    """The mean over prompts and sampling seeds.

    The deviation is the larger of the standard error over concepts (pictures of one concept in several styles hit or
    miss together; seeds share their prompts, so more of them cannot make up for few) and the standard deviation over
    seeds.

    Args:
        values: one tensor (N,) a seed, in the same order of prompts.
        concepts: (N,) the concept of each prompt.
    """
    table = torch.stack(list(values))
    # The cluster-robust error of a mean: residuals are summed within a concept before they are squared.
    residuals = _concept_sums(table.mean(0) - table.mean(), concepts)
    error = float(residuals.square().sum().sqrt()) / table.shape[1]
    between = float(table.mean(1).std(correction=1)) if len(table) > 1 else 0.0
    over = f"{len(table)} seeds" if between > error else f"{len(residuals)} concepts (standard error)"
    return Estimate(float(table.mean()), max(error, between), over)


def _concept_sums(values: Tensor, concepts: Tensor) -> Tensor:
    """(N,) -> (number of distinct concepts,)."""
    _, column = torch.unique(concepts, return_inverse=True)
    return torch.zeros(int(column.max()) + 1, dtype=values.dtype).index_add(0, column, values)


def over_seeds(values: Sequence[Estimate]) -> Estimate:
    """The mean over sampling seeds; its deviation is the larger of the seeds' own and the mean one within a seed.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no seeds to average")
    if len(values) == 1:
        return values[0]
    numbers = torch.tensor([value.value for value in values], dtype=torch.float64)
    within = sum(value.deviation for value in values) / len(values)
    between = float(numbers.std(correction=1))
    over = f"{len(values)} seeds" if between > within else values[0].over
    return Estimate(float(numbers.mean()), max(between, within), over)


def recall_ratio(
    ranks: Sequence[Tensor],
    reference: Sequence[Tensor],
    k: int,
    concepts: Tensor,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate | None:
    """Recall at ``k`` of one row over that of another on the same prompts, with a bootstrap over their concepts.

    Concepts are drawn together for both rows, which keeps their correlation: a hard one is hard for both.

    Args:
        concepts: (N,) the concept of each prompt.

    Returns:
        None when the reference never hits.
    """
    ours = torch.stack([(row < k).double() for row in ranks]).mean(0)
    theirs = torch.stack([(row < k).double() for row in reference]).mean(0)
    if not bool(theirs.sum() > 0):
        return None
    generator = torch.Generator().manual_seed(seed)
    above, below = _concept_sums(ours, concepts), _concept_sums(theirs, concepts)
    drawn = torch.randint(len(above), (resamples, len(above)), generator=generator)
    sums = below[drawn].sum(1)
    ratios = (above[drawn].sum(1) / sums)[sums > 0]
    return Estimate(
        float(ours.mean() / theirs.mean()), float(ratios.std(correction=0)), f"bootstrap over {len(above)} concepts"
    )
