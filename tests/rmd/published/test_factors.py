"""Low-rank factors of changes that are themselves of a low rank, as a LoRA's are."""

from __future__ import annotations

import pytest
import torch

from rmd.published.factors import best_factors


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (32, 16, 3, 3), (48, 48)])
def test_a_rank_beyond_the_changes_own_is_filled_up_with_zeros(shape: tuple[int, ...]) -> None:
    """Directions that are rounding alone were divided by a root of almost nothing: infinite factors."""
    generator = torch.Generator().manual_seed(3)
    columns = torch.Size(shape[1:]).numel()
    up, down = torch.randn(shape[0], 2, generator=generator), torch.randn(2, columns, generator=generator)
    change = (up.double() @ down.double()).reshape(shape)
    for rank in (2, 16, 40, 100):
        factors = best_factors(change, rank)
        assert factors.rank == rank and factors.up.isfinite().all() and factors.down.isfinite().all()
        assert torch.linalg.norm(factors.change() - change) <= 1e-5 * torch.linalg.norm(change)
        assert not factors.down[2:].any() or not factors.up[:, 2:].any()
