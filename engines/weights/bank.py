"""One copy of a component's weights, shared by its engines of all sizes and batches.

Engines that pack their weights read them in a blocked layout. A :class:`Recipe` says how such a constant comes from the
network's parameters, so it can be made once a process, shared by every engine with the same layout, and made again in
place when the weights are replaced.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
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
        strides: in elements, as the kernels were compiled to step through it; None: contiguous. They take an address
            alone, and would read a matrix that lies the other way round without a word.
    """

    sources: tuple[str, ...]
    layout: str = "plain"
    block: int = 0
    crop: tuple[int, int] | None = None
    strides: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As stored in a manifest."""
        return asdict(self) | {"sources": list(self.sources)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Read what :meth:`to_dict` wrote."""
        crop, strides = data.get("crop"), data.get("strides")
        return cls(
            tuple(data["sources"]),
            str(data["layout"]),
            int(data["block"]),
            None if crop is None else (crop[0], crop[1]),
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
        self._lent: Counter[Recipe] = Counter()
        self._shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}
        self._device = next(iter(self._tensors.values())).device if self._tensors else torch.device("cpu")

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by name; those that :meth:`release` dropped are absent."""
        return self._tensors

    def constant(self, recipe: Recipe) -> Tensor:
        """The constant of ``recipe``: the same tensor for every engine that asks while one holds it."""
        made = self._made.get(recipe)
        if made is None:
            made = recipe.make(self._tensors)
            if any(made is self._tensors[name] for name in recipe.sources):
                return made
            if any(made.data_ptr() == self._tensors[name].data_ptr() for name in recipe.sources):
                made = made.clone() if recipe.layout != "transposed" else made
            self._made[recipe] = made
        return made

    def lend(self, recipe: Recipe) -> Tensor:
        """As :meth:`constant`, for a user whose library keeps a reference for ever; to be followed by
        :meth:`take_back`."""
        made = self.constant(recipe)
        self._lent[recipe] += 1
        return made

    def take_back(self, recipe: Recipe) -> None:
        """One who borrowed the constant is gone. With the last of them goes its memory, unless it is a parameter."""
        self._lent[recipe] -= 1
        if self._lent[recipe] <= 0:
            del self._lent[recipe]
            made = self._made.pop(recipe, None)
            if made is not None:
                hollow(made)

    def close(self) -> None:
        """Give everything back; nothing that reads this bank may run any more. The network keeps its own weights."""
        for tensor in [*self._tensors.values(), *self._made.values()]:
            hollow(tensor)
        self._tensors, self.module = {}, None
        self._made.clear()
        self._lent.clear()

    def release(self, keep: Iterable[Recipe]) -> None:
        """Drop parameters and buffers that no constant in ``keep`` is a view of: their packed copies are the weights
        now."""
        used = {recipe.sources[0] for recipe in keep if self._is_view(recipe)}
        kept = {self._tensors[name].data_ptr() for name in used}
        dropped = [tensor for name, tensor in self._tensors.items() if name not in used]
        # One of a tied parameter's names may be in use, and not the other.
        addresses = {tensor.data_ptr() for tensor in dropped} - kept
        self._tensors = {name: tensor for name, tensor in self._tensors.items() if name in used}
        if self.module is not None:
            # Whoever else holds the module (a backbone that runs through engines) must not keep a second copy alive.
            for tensor in [*self.module.parameters(), *self.module.buffers()]:
                if tensor.data_ptr() in addresses:
                    hollow(tensor)
        for tensor in dropped:
            hollow(tensor)  # an engine that was refused, or replaced, has left a reference to it
        self.module = None

    def _is_view(self, recipe: Recipe) -> bool:
        """Whether its constant has no memory of its own."""
        if len(recipe.sources) != 1 or recipe.layout not in ("plain", "transposed") or recipe.crop is not None:
            return False
        source = self._tensors.get(recipe.sources[0])
        if source is None:
            return False
        return strides_of(lay_out(source, recipe.layout, 0)) == recipe.strides

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
        now = {**self._tensors, **cast}
        # A table that was dropped once its crop was made, and is not given, is as it was.
        made = {recipe: recipe.make(now) for recipe in list(self._made) if now.keys() >= set(recipe.sources)}
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
            if absent and len(absent) < len(recipe.sources):
                raise EngineError(f"refit: the new weights lack {absent[0]!r}, which an engine joins with others")

    def memory(self) -> int:
        """Bytes of everything held, each storage counted once."""
        return storage_bytes([*self._tensors.values(), *self._made.values()])


def hollow(tensor: Tensor) -> None:
    """Take a tensor's memory, whoever else refers to that very tensor.

    AOTInductor's loader makes a reference to every constant that it is given and deletes none, so what an engine was
    given would outlive it, and the process would hold one more set of weights for every time that it loads one.
    """
    tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())
