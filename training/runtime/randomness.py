"""The explicit random generators of everything that training draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Randomness:
    """Draws that can be saved and restored.

    Noise is drawn where it is used: on a GPU, drawing it on the CPU would take longer than the update it is for. So one
    seed gives the same prompts and times on every device, and the same noise on every device of a kind.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = torch.device(device)
        self.dtype = dtype
        self.seed = seed
        self.noise = self.generator
        if self.device.type != "cpu":
            self.noise = torch.Generator(self.device).manual_seed(seed)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal values."""
        return torch.randn(tuple(shape), generator=self.noise, dtype=self.dtype, device=self.device)

    def uniform(self, count: int) -> Tensor:
        """`count` values in [0, 1), float64."""
        return torch.rand(count, generator=self.generator, dtype=torch.float64).to(self.device)

    def integers(self, high: int, count: int) -> Tensor:
        """`count` whole numbers in [0, high), int64, on the CPU: they index things."""
        return torch.randint(high, (count,), generator=self.generator)

    def state(self) -> dict[str, Tensor]:
        """The generators' states, uint8, by name."""
        states = {"generator": self.generator.get_state()}
        if self.noise is not self.generator:
            states[f"noise_{self.device.type}"] = self.noise.get_state()
        return states

    def load_state(self, states: Mapping[str, Tensor], iteration: int = 0) -> None:
        """Restore what :meth:`state` gave.

        Args:
            iteration: of the run. On another kind of device than before it seeds the noise, which is then new, not the
                run's first once more.
        """
        self.generator.set_state(states["generator"].cpu())
        if self.noise is self.generator:
            return
        own = states.get(f"noise_{self.device.type}")
        if own is not None:
            self.noise.set_state(own.cpu())
        else:
            self.noise.manual_seed(self.seed + 1_000_003 * (iteration + 1))
