"""Inputs to compile, compare and time engines with."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.spec import EngineSpec


def example_tensors(spec: EngineSpec, device: torch.device | str) -> dict[str, Tensor]:
    """Inputs of a spec's shapes at its widest batch: normal noise for floating ones, 500 for timesteps, text whose
    second half is padding for masks, small numbers for token ids."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for item in spec.inputs:
        dtype = item.torch_dtype
        if item.name == "timestep":
            value = torch.full(item.shape, 500.0)
        elif dtype.is_floating_point:
            value = torch.randn(item.shape, generator=generator)
        elif "mask" in item.name:
            value = torch.ones(item.shape)
            value[..., (item.shape[-1] + 1) // 2 :] = 0
        else:
            value = torch.randint(1, 50, item.shape, generator=generator)
        made[item.name] = value.to(device, dtype)
    return made
