"""The denoiser with its large linear layers in FP8: what it gains, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.gpu.case import Context, Row, relative_l2
from bench.gpu.networks import channels_last, part

_LARGEST = 448.0  # of float8_e4m3fn
_LEAST_SIDE = {"full": 1280, "tiny": 16}


class ScaledLinear(nn.Module):
    """A linear layer whose rows and columns are scaled into float8 each by its own largest value.

    Args:
        linear: its weights are quantised here, its inputs at every call.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = _scale(linear.weight)
        self.register_buffer("weight", (linear.weight / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale.float().t())
        self.bias = linear.bias
        self.weight: Tensor
        self.scale: Tensor

    def forward(self, given: Tensor) -> Tensor:
        rows = given.reshape(-1, given.shape[-1])
        scale = _scale(rows)
        small = (rows / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        if given.device.type == "cuda":
            product = torch._scaled_mm(
                small, self.weight.t(), scale.float(), self.scale.contiguous(), out_dtype=given.dtype
            )
        else:  # the same numbers, multiplied wider: a rehearsal
            product = (small.float() @ self.weight.float().t() * scale.float() * self.scale).to(given.dtype)
        product = product if self.bias is None else product + self.bias
        return product.reshape(*given.shape[:-1], -1)


def _scale(matrix: Tensor) -> Tensor:
    return matrix.abs().amax(dim=-1, keepdim=True).clamp(min=1e-6) / _LARGEST


def denoiser(context: Context) -> Iterator[Row]:
    """Compiled in bfloat16 and in FP8, with the error between them."""
    subject = context.subject()
    size = subject.sizes[-1]
    module, inputs = part(subject, "denoiser", size)
    call = context.call(torch.compile(channels_last(module), fullgraph=True, dynamic=False), inputs)
    yield from context.time({f"denoiser {size} compiled": call})
    reference = call().clone()
    replaced = scale_linears(module, _LEAST_SIDE[context.scale])
    torch._dynamo.reset()
    small = context.call(torch.compile(module, fullgraph=True, dynamic=False), inputs)
    for row in context.time({f"denoiser {size} compiled, {replaced} layers in FP8": small}):
        yield row | ({} if "failed" in row else {"relative L2": relative_l2(small(), reference)})


def scale_linears(module: nn.Module, least: int) -> int:
    """Put :class:`ScaledLinear` in the place of every linear layer with both sides at least ``least`` and multiples of
    16, as the kernels want; returns how many."""
    count = 0
    for name, child in module.named_children():
        sides = (child.in_features, child.out_features) if isinstance(child, nn.Linear) else ()
        if isinstance(child, nn.Linear) and min(sides) >= least and not any(side % 16 for side in sides):
            setattr(module, name, ScaledLinear(child))
            count += 1
        else:
            count += scale_linears(child, least)
    return count
