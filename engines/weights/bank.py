"""One copy of a component's weights, shared by its engines of all sizes and batches."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from engines.errors import EngineError
from engines.weights.recipes import Recipe, lay_out, strides_of


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
        part = recipe.crop is not None or recipe.rows is not None
        if len(recipe.sources) != 1 or recipe.layout not in ("plain", "transposed") or part:
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
