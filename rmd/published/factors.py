"""Low-rank factors of a weight's change: the best of their rank, by singular value decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A weight's change as ``up @ down``, both flattened to matrices.

    Attributes:
        down: (rank, in, ...), in the shape of a layer that maps to ``rank`` channels.
        up: (out, rank, 1, ...).
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Of the product, at most."""
        return self.down.shape[0]

    def change(self) -> Tensor:
        """The product in the weight's shape, float32."""
        product: Tensor = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return product.reshape(self.up.shape[0], *self.down.shape[1:])

    def to(self, dtype: torch.dtype) -> Factors:
        """The same, rounded."""
        return Factors(self.down.to(dtype), self.up.to(dtype))


def squared_singular_values(change: Tensor) -> Tensor:
    """Of a weight's change (out, in, ...), float64, descending, min(out, in ...) of them."""
    squares: Tensor = torch.linalg.eigvalsh(_gram(_matrix(change)))
    return squares.clamp_min(0).flip(0)


def best_factors(change: Tensor, rank: int) -> Factors:
    """The product of that rank which is nearest to a change (out, in, ...) in the Frobenius norm (Eckart, Young).

    The singular values' square roots are in both factors, so that both fit sixteen bits. A rank beyond the change's own
    is filled up with zeros.
    """
    matrix = _matrix(change)
    squares, vectors = torch.linalg.eigh(_gram(matrix))
    # What is lost in the largest one's rounding is no direction: divided by its root, it is infinite.
    least = squares[-1] * len(squares) * torch.finfo(torch.float64).eps
    squares, vectors = squares[-rank:].flip(0), vectors[:, -rank:].flip(1)
    vectors = vectors * (squares > least)
    roots = squares.clamp_min(least.clamp_min(torch.finfo(torch.float64).tiny)) ** 0.25
    if matrix.shape[0] <= matrix.shape[1]:
        up, down = vectors * roots, (vectors.T @ matrix) / roots[:, None]
    else:
        up, down = (matrix @ vectors) / roots, vectors.T * roots[:, None]
    missing = rank - up.shape[1]
    up = torch.nn.functional.pad(up, (0, missing))
    down = torch.nn.functional.pad(down, (0, 0, 0, missing))
    ones = (1,) * (change.ndim - 2)
    return Factors(down.float().reshape(rank, *change.shape[1:]), up.float().reshape(change.shape[0], rank, *ones))


def smallest_rank(spectra: Sequence[Tensor], error: float) -> int:
    """The smallest rank, the same for all matrices, at which what is cut off is at most ``error`` of the whole.

    Args:
        spectra: squared singular values of each, descending.
        error: of the root of the summed squares, relative.

    Raises:
        ValueError: no rank below the full one does.
    """
    longest = max(len(values) for values in spectra)
    energy = torch.stack([torch.nn.functional.pad(values, (0, longest - len(values))) for values in spectra]).sum(0)
    beyond = energy.sum() - energy.cumsum(0)
    fitting = torch.nonzero(beyond <= error**2 * energy.sum())
    if not len(fitting) or int(fitting[0]) + 1 == longest:
        raise ValueError(f"a relative error of {error:g} needs the full rank: allow a larger one, or give a rank")
    return int(fitting[0]) + 1


def _matrix(change: Tensor) -> Tensor:
    return change.flatten(1).to(torch.float64)


def _gram(matrix: Tensor) -> Tensor:
    """The product with its transpose that is the smaller: its eigenvalues are the squared singular values.

    In float64, singular values below 1e-8 of the largest are lost: far below what sixteen-bit factors keep.
    """
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
