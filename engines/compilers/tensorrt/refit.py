"""Which parameter each weight of a plan comes from, and giving a plan new ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.errors import EngineError
from engines.weights.recipes import Recipe, find_recipe

# torch's dtypes as TensorRT's module names them.
_TYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


class WeightIndex:
    """A network's parameters and buffers, to be found by value.

    A network and its plan have thousands of each: they are compared only where a checksum, made once, agrees.

    Args:
        held: by name; all on one device.
    """

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        self._held: dict[tuple[torch.dtype, int], dict[str, Tensor]] = {}
        for name, tensor in held.items():
            self._held.setdefault((tensor.dtype, _checksum(tensor)), {})[name] = tensor

    def only_recipe(self, weight: Tensor) -> Recipe | None:
        """How ``weight`` comes from one of them; None where several are equal (zero biases, norms of ones)."""
        found: list[Recipe] = []
        for name, tensor in self._held.get((weight.dtype, _checksum(weight)), {}).items():
            recipe = find_recipe(_shaped(weight, tensor), {name: tensor}, {})
            found += [] if recipe is None else [recipe]
            if len(found) > 1:
                return None
        return found[0] if found else None


def _checksum(tensor: Tensor) -> int:
    """The sum of the elements' bits: the same in whatever order, or padded with zeros."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(kind).sum(dtype=torch.int64))


def _shaped(weight: Tensor, like: Tensor) -> Tensor:
    """A weight that differs from a parameter by sides of 1 (a table of modulations, say) in the parameter's shape."""
    same = [side for side in weight.shape if side != 1] == [side for side in like.shape if side != 1]
    return weight.reshape(like.shape) if same else weight


def refit_plan(tensorrt: Any, refitter: Any, made: Mapping[str, Tensor], title: str) -> None:
    """Give a plan new weights.

    Args:
        tensorrt: the library.
        refitter: ``tensorrt.Refitter`` of the plan.
        made: on the CPU, contiguous, by the names they were recorded under. The builder folds or fuses some of those
            away, and the plan knows no such name any more: they are passed over.
        title: of the engine, for messages.

    Raises:
        EngineError: TensorRT refuses a weight, or lacks one. The plan may hold old ones and new ones then.
    """
    known = set(refitter.get_all_weights())
    # double is truncated when a plan is built.
    kept = {
        name: (tensor.float() if tensor.dtype == torch.float64 else tensor).contiguous()
        for name, tensor in made.items()
        if name in known
    }
    for name, tensor in kept.items():
        if tensor.dtype not in _TYPES:
            raise EngineError(f"refit of {title}: TensorRT holds no {tensor.dtype}, which {name!r} is")
        holder = tensorrt.Weights(getattr(tensorrt, _TYPES[tensor.dtype]), tensor.data_ptr(), tensor.numel())
        if not refitter.set_named_weights(name, holder, tensorrt.TensorLocation.HOST):
            raise EngineError(f"TensorRT does not take new weights for {name!r} in {title}")
    missing = refitter.get_missing_weights()
    if missing:
        raise EngineError(f"refit of {title} lacks {missing[0]!r}; build the engine again")
    if not refitter.refit_cuda_engine():
        raise EngineError(f"TensorRT could not refit {title}")


# ---- what a refit needs beside the traced parameters -----------------------------------------------------------------

REST = "rest.safetensors"
FIXED = "fixed.json"


def save_rest(folder: Path, constants: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> None:
    """Keep beside a plan what a refit has to give it back, and what must not change.

    Args:
        constants: weights of the plan that are none of the network's parameters, by the plan's names. A refit has to
            name every weight of a plan.
        fixed: parameters and buffers whose place in the plan is not known.
    """
    from safetensors.torch import save_file

    if constants:
        save_file({name: tensor.cpu().contiguous().clone() for name, tensor in constants.items()}, folder / REST)
    kept = {name: [_name(tensor.dtype), _digest(tensor)] for name, tensor in sorted(fixed.items())}
    (folder / FIXED).write_text(json.dumps(kept, indent=1))


def read_rest(folder: Path) -> dict[str, Tensor]:
    """The constants that :func:`save_rest` kept."""
    from safetensors.torch import load_file

    return load_file(folder / REST) if (folder / REST).is_file() else {}


def changed_fixed(folder: Path, state: Mapping[str, Tensor]) -> list[str]:
    """The parameters and buffers whose place is not known and that ``state`` has with another value."""
    return [
        name
        for name, (dtype, digest) in json.loads((folder / FIXED).read_text()).items()
        if name in state and _digest(state[name].to(getattr(torch, dtype))) != digest
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(content.tobytes()).hexdigest()
