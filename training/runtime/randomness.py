"""The explicit random generators of everything that training draws."""

from __future__ import annotations

import hashlib
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
        self.common = torch.Generator().manual_seed(seed)
        self.device = torch.device(device)
        self.dtype = dtype
        self.seed = seed
        self.noise = self.generator
        if self.device.type != "cpu":
            self.noise = torch.Generator(self.device).manual_seed(seed)

    def at(self, update: int, part: int, micro_batch: int) -> None:
        """Start anew at one place of a run, so that what is drawn there depends on nothing that was drawn before.

        Args:
            update: of the run.
            part: of the update.
            micro_batch: its number among those of all processes: however they are spread, each draws the same.
        """
        own = _key(self.seed, update, part, micro_batch)
        self.generator.manual_seed(own)
        if self.noise is not self.generator:
            self.noise.manual_seed(own)
        self.common.manual_seed(_key(self.seed, update, part))

    def shared(self) -> float:
        """A value in [0, 1), the same in every micro-batch of a part of an update (:meth:`at`).

        What decides how often a network is called is drawn so: processes that shard it call it together or hang.
        """
        return float(torch.rand(1, generator=self.common, dtype=torch.float64))

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


def _key(*numbers: int) -> int:
    """A seed of 63 bits that tells any two places apart."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
