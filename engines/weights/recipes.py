"""How a constant that an engine reads comes from the parameters of its network.

Engines that pack their weights read them in a blocked layout. A :class:`Recipe` says how such a constant is made, so it
can be made once a process, shared by every engine with the same layout, and made again in place when the weights are
replaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engines.errors import EngineError


@dataclass(frozen=True)
class Recipe:
    """How a constant is made: parameters joined along dimension 0, then laid out.

    Attributes:
        sources: names of the component's parameters or buffers.
        layout: "plain" (as is), "matrix" (a convolution's kernel (N, C, p, p) as (N, C p p)), "transposed", "blocked"
            ((N / n, K, n) blocks of the transposed matrix, columns padded with zeros), or "vnni" (the same, pairs of
            rows interleaved, as matrix tiles read them).
        block: n; 0 for the layouts without blocks.
        crop: (h, w): the middle of a square table of positions (1, S S, D), as (1, h w, D).
        rows: the first so many rows of a table of positions (S, D); None for all.
        strides: in elements, as the kernels were compiled to step through it; None: contiguous. They take an address
            alone, and would read a matrix that lies the other way round without a word.
    """

    sources: tuple[str, ...]
    layout: str = "plain"
    block: int = 0
    crop: tuple[int, int] | None = None
    rows: int | None = None
    strides: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As stored in a manifest."""
        return asdict(self) | {"sources": list(self.sources)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Read what :meth:`to_dict` wrote."""
        crop, rows, strides = data.get("crop"), data.get("rows"), data.get("strides")
        return cls(
            tuple(data["sources"]),
            str(data["layout"]),
            int(data["block"]),
            None if crop is None else (crop[0], crop[1]),
            None if rows is None else int(rows),
            None if strides is None else tuple(int(step) for step in strides),
        )

    def make(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The constant; for a single "plain" source that lies as it should that very tensor, not a copy.

        Raises:
            EngineError: a source is missing.
        """
        missing = [name for name in self.sources if name not in tensors]
        if missing:
            raise EngineError(f"the weights lack {missing[0]!r}, which an engine needs; build the engines again")
        parts = [tensors[name] for name in self.sources]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.crop is not None:
            joined = _middle(joined, *self.crop)
        if self.rows is not None:
            joined = joined[: self.rows].clone()
        # A patch embedding's kernel serves as a matrix in every other layout.
        made = lay_out(joined if self.layout == "plain" else joined.flatten(1), self.layout, self.block)
        return made if strides_of(made) == self.strides else self._restrided(made)

    def _restrided(self, made: Tensor) -> Tensor:
        if self.strides is None:
            return made.contiguous()
        return torch.empty_strided(made.shape, self.strides, dtype=made.dtype, device=made.device).copy_(made)


def strides_of(tensor: Tensor) -> tuple[int, ...] | None:
    """A tensor's strides as a :class:`Recipe` has them: None where it is contiguous, and 1 for sides of 1."""
    if tensor.is_contiguous():
        return None
    return tuple(step if side != 1 else 1 for side, step in zip(tensor.shape, tensor.stride(), strict=True))


def lay_out(weight: Tensor, layout: str, block: int) -> Tensor:
    """A matrix (N, K) in one of :class:`Recipe`'s layouts.

    Raises:
        ValueError: unknown layout.
    """
    if layout in ("plain", "matrix"):
        return weight
    if layout == "transposed":
        return weight.t()
    if layout not in ("blocked", "vnni"):
        raise ValueError(f"unknown layout {layout!r}")
    columns, rows = weight.shape
    blocks = -(-columns // block)
    padding = blocks * block - columns
    padded = torch.nn.functional.pad(weight, (0, 0, 0, padding)) if padding else weight.contiguous()
    if layout == "blocked":
        return padded.view(blocks, block, rows).transpose(1, 2).contiguous()
    if padded.element_size() == 2 and padded.data_ptr() % 4 == 0 and padded.storage_offset() % 2 == 0:
        # A pair of bfloat16 moves as one number: four times as fast.
        moved = padded.view(torch.int32).view(blocks, block, rows // 2).transpose(1, 2).contiguous()
        return moved.view(weight.dtype).view(blocks, rows, block)
    return padded.view(blocks, block, rows // 2, 2).transpose(1, 2).reshape(blocks, rows, block)


def _middle(table: Tensor, height: int, width: int) -> Tensor:
    side = math.isqrt(table.shape[1])
    top, left = (side - height) // 2, (side - width) // 2
    grid = table.reshape(1, side, side, -1)[:, top : top + height, left : left + width]
    return grid.reshape(1, height * width, -1)


def find_recipe(constant: Tensor, candidates: Mapping[str, Tensor], sources: Mapping[str, Recipe]) -> Recipe | None:
    """How ``constant`` comes from one of ``candidates``, its strides included, or None. Values decide, so they must be
    distinct.

    Args:
        constant: as the compiler left it.
        candidates: the compiled module's parameters and buffers.
        sources: for candidates that are none of the component's own: how they come from those.
    """
    for name, tensor in candidates.items():
        if tensor.dtype != constant.dtype:
            continue
        for layout, block in _possible(constant, tensor):
            if torch.equal(lay_out(tensor, layout, block), constant):
                base = replace(sources.get(name, Recipe((name,))), strides=strides_of(constant))
                return base if layout == "plain" else replace(base, layout=layout, block=block)
    return None


def _possible(constant: Tensor, tensor: Tensor) -> Iterable[tuple[str, int]]:
    if constant.shape == tensor.shape:
        yield "plain", 0
    if tensor.dim() != 2:
        return
    columns, rows = tensor.shape
    if constant.shape == (rows, columns):
        yield "transposed", 0
    if constant.dim() == 3 and constant.shape[1] == rows and constant.shape[0] == -(-columns // constant.shape[2]):
        yield "blocked", int(constant.shape[2])
        if rows % 2 == 0:
            yield "vnni", int(constant.shape[2])
