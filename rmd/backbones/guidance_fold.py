"""One guidance, folded into a UNet that takes its guidance as an input (LCM's whole UNets).

Such a network adds `P e(w)`, w = guidance - 1, to the sinusoidal time before the first layer of its time embedding,
where `e` is a sinusoidal code of w and P is `cond_proj`. For one guidance that is a constant c, and `W (x + c) + b` is
`W x + (b + W c)`: exactly a bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rmd.backbones.base import BackboneError

_PROJECTION = "time_embedding.cond_proj.weight"
FOLDED_WEIGHT, _BIAS = "time_embedding.linear_1.weight", "time_embedding.linear_1.bias"
GUIDANCE_INPUT = "time_cond_proj_dim"
TOUCHED = (_PROJECTION, FOLDED_WEIGHT, _BIAS)
"""The weights that folding looks at: the first goes, the last changes."""


def guidance_code(guidance_scale: float, width: int) -> Tensor:
    """`e(w)` as diffusers' latent consistency pipelines make it: sines, then cosines, of `1000 w`; (width,) float64."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (guidance_scale - 1) * frequencies
    code = torch.cat([angles.sin(), angles.cos()])
    return torch.nn.functional.pad(code, (0, width - 2 * half))


def fold_guidance(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], guidance_scale: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same network at one guidance, without the input.

    Args:
        weights: the UNet's, under diffusers' names.
        config: its configuration, with ``time_cond_proj_dim``.
        guidance_scale: what diffusers' pipeline would be called with; 1 is none.

    Returns:
        weights without ``cond_proj`` (the changed bias is computed in float64 and rounded once, to its own dtype) and
        the configuration without the input.

    Raises:
        BackboneError: the network has no such input, or a weight of it is missing or of another shape.
    """
    width = config.get(GUIDANCE_INPUT)
    if width is None:
        raise BackboneError(f"this network takes no guidance as an input ({GUIDANCE_INPUT} is not set)")
    for name in TOUCHED:
        if name not in weights:
            raise BackboneError(f"this network takes its guidance as an input and lacks the weight {name!r}")
    projection, weight, bias = (weights[name].double() for name in TOUCHED)
    if projection.shape != (weight.shape[1], width):
        raise BackboneError(f"{_PROJECTION} has shape {tuple(projection.shape)}, not {(weight.shape[1], width)}")
    folded = bias + weight @ (projection @ guidance_code(guidance_scale, int(width)))
    kept = {name: value for name, value in weights.items() if name != _PROJECTION}
    return {**kept, _BIAS: folded.to(weights[_BIAS].dtype)}, {**config, GUIDANCE_INPUT: None}
