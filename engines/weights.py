"""One copy of a component's weights, shared by its engines of all sizes and batches.

Engines that pack their weights read them in a blocked layout. A :class:`Recipe` says how such a constant comes from the
network's parameters, so it can be made once a process, shared by every engine with the same layout, and made again in
place when the weights are replaced.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

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
    """

    sources: tuple[str, ...]
    layout: str = "plain"
    block: int = 0
    crop: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As stored in a manifest."""
        return asdict(self) | {"sources": list(self.sources)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Read what :meth:`to_dict` wrote."""
        crop = data.get("crop")
        return cls(
            tuple(data["sources"]),
            str(data["layout"]),
            int(data["block"]),
            None if crop is None else (crop[0], crop[1]),
        )

    @property
    def is_parameter(self) -> bool:
        """The constant is a parameter itself, not a copy."""
        return len(self.sources) == 1 and self.layout == "plain" and self.crop is None

    def make(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The constant; for a single "plain" source that very tensor, not a copy.

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
        # A patch embedding's kernel serves as a matrix in every other layout.
        return lay_out(joined if self.layout == "plain" else joined.flatten(1), self.layout, self.block)


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
    """How ``constant`` comes from one of ``candidates``, or None. Values decide, so they must be distinct.

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
                base = sources.get(name, Recipe((name,)))
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


class WeightBank:
    """The weights of one component, and the constants made of them.

    Args:
        module: on the device where engines run. It is kept only while something needs it (:meth:`release`).
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: nn.Module | None = module
        self._tensors: dict[str, Tensor] = {
            name: tensor.detach()
            for name, tensor in [
                *module.named_parameters(remove_duplicate=False),
                *module.named_buffers(remove_duplicate=False),
            ]
        }
        names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self.parameters: tuple[tuple[str, ...], ...] = tuple(tuple(tied) for tied in names.values())
        """The names of every parameter, in the network's order; several where it is tied."""
        # Weak: a constant lives as long as an engine reads it.
        self._made: weakref.WeakValueDictionary[Recipe, Tensor] = weakref.WeakValueDictionary()
        self._shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}
        self._device = next(iter(self._tensors.values())).device if self._tensors else torch.device("cpu")

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by name; those that :meth:`release` dropped are absent."""
        return self._tensors

    def constant(self, recipe: Recipe) -> Tensor:
        """The constant of ``recipe``: the same tensor for every engine that asks while one holds it."""
        if recipe.is_parameter:
            return recipe.make(self._tensors)
        made = self._made.get(recipe)
        if made is None:
            made = recipe.make(self._tensors)
            if any(made.data_ptr() == self._tensors[name].data_ptr() for name in recipe.sources):
                made = made.clone() if recipe.layout != "transposed" else made
            self._made[recipe] = made
        return made

    def release(self, keep: Iterable[Recipe]) -> None:
        """Drop parameters that no constant in ``keep`` is a view of: their packed copies are the weights now."""
        used = {
            recipe.sources[0]
            for recipe in keep
            if len(recipe.sources) == 1 and recipe.layout in ("plain", "transposed") and recipe.crop is None
        }
        dropped = {tensor.data_ptr() for name, tensor in self._tensors.items() if name not in used}
        self._tensors = {name: tensor for name, tensor in self._tensors.items() if name in used}
        if self.module is not None:
            # Whoever else holds the module (a backbone that runs through engines) must not keep a second copy alive.
            for parameter in self.module.parameters():
                if parameter.data_ptr() in dropped:
                    parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        self.module = None

    def refit(self, state: Mapping[str, Tensor]) -> None:
        """Replace weights in place: every engine that shares them sees the new ones at its next run.

        Args:
            state: parameters by name; all of those the component has (tied ones under any of their names). Buffers
                may be left out.

        Raises:
            EngineError: see :meth:`check`. Nothing was changed then.
        """
        self.check(state)
        cast = {
            name: tensor.detach().to(self._device, self._shapes[name][1])
            for name, tensor in state.items()
            if name in self._shapes
        }
        for tied in self.parameters:
            given = next(name for name in tied if name in cast)
            cast |= {name: cast[given] for name in tied if name not in cast}
        made = {recipe: recipe.make({**self._tensors, **cast}) for recipe in list(self._made)}
        with torch.no_grad():
            for recipe, value in made.items():
                current = self._made.get(recipe)
                if current is not None:
                    current.copy_(value)
            for name, tensor in self._tensors.items():
                if name in cast:
                    tensor.copy_(cast[name])

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Whether ``state`` can be taken (:meth:`refit`).

        Raises:
            EngineError: a parameter is missing, or has another shape.
        """
        for name, (shape, _) in self._shapes.items():
            if name in state and tuple(state[name].shape) != shape:
                raise EngineError(
                    f"refit: {name!r} has shape {tuple(state[name].shape)}, the engines were built for {shape}"
                )
        lacking = [tied[0] for tied in self.parameters if state.keys().isdisjoint(tied)]
        if lacking:
            raise EngineError(f"refit: the new weights lack {lacking[0]!r} ({len(lacking)} in all)")
        tied_to = {name for tied in self.parameters for name in tied}
        for recipe in list(self._made):
            absent = [n for n in recipe.sources if n not in tied_to and n not in state and n not in self._tensors]
            if absent:
                raise EngineError(f"refit: the new weights lack {absent[0]!r}")

    def memory(self) -> int:
        """Bytes of everything held, each storage counted once."""
        return storage_bytes([*self._tensors.values(), *self._made.values()])


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())
