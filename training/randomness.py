"""One explicit random generator for everything that training draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Randomness:
    """Draws on the CPU, so that a run is the same on every device, and can be saved and restored."""

    def __init__(self, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = torch.device(device)
        self.dtype = dtype

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal values."""
        return torch.randn(tuple(shape), generator=self.generator, dtype=self.dtype).to(self.device)

    def uniform(self, count: int) -> Tensor:
        """`count` values in [0, 1), float64."""
        return torch.rand(count, generator=self.generator, dtype=torch.float64).to(self.device)

    def integers(self, high: int, count: int) -> Tensor:
        """`count` whole numbers in [0, high), int64, on the CPU: they index things."""
        return torch.randint(high, (count,), generator=self.generator)

    def state(self) -> Tensor:
        """The generator's state, uint8."""
        return self.generator.get_state()

    def load_state(self, state: Tensor) -> None:
        """Restore what :meth:`state` gave."""
        self.generator.set_state(state.cpu())
