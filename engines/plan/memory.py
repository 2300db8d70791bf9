"""How much memory engines will take, reckoned and checked before anything is built."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engines.errors import NotEnoughMemory

_MIB = 1 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a set of engines needs on its device.

    Attributes:
        weights: by component; once for shared weights, once an engine for those inside engines.
        workspace: of the largest engine, and of every one that keeps its own.
        building: further bytes while engines are compiled.
        available: on the device, when the plan was made.
        device: for the message.
    """

    weights: Mapping[str, int]
    workspace: int
    building: int
    available: int
    device: str

    @property
    def total(self) -> int:
        """When everything is loaded and running."""
        return sum(self.weights.values()) + self.workspace

    def describe(self) -> str:
        """For people, one line each."""
        lines = [f"memory plan for {self.device}:"]
        lines += [f"  weights of {name}: {size / _MIB:.0f} MiB" for name, size in self.weights.items()]
        lines.append(f"  workspace: {self.workspace / _MIB:.0f} MiB")
        lines.append(f"  loaded: {self.total / _MIB:.0f} MiB, while building {self.building / _MIB:.0f} MiB more")
        lines.append(f"  available: {self.available / _MIB:.0f} MiB")
        return "\n".join(lines)

    def check(self) -> None:
        """Raises :class:`NotEnoughMemory` when it does not fit; the message says what would make it fit."""
        needed = self.total + self.building
        if needed > self.available:
            raise NotEnoughMemory(
                f"the engines need {needed / _MIB:.0f} MiB and {self.device} has {self.available / _MIB:.0f} MiB free; "
                f"build smaller buckets (--buckets 1,2), free memory, or, where engines hold their weights "
                f"themselves (tensorrt), use --backend inductor"
            )


def available_bytes(device: torch.device | str) -> int:
    """Free memory of ``device`` right now."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    import psutil

    return int(psutil.virtual_memory().available)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, wherever they lie; shared ones once."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy on the meta device, ties kept, made without copying a weight: on a GPU a second set may not fit."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def workspace_bytes(module: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Largest sum of live intermediate tensors in one forward pass, found on the meta device (no memory, no time).

    Compiled code fuses and reuses, so that this is an upper estimate for it; attention counts as its output alone,
    since no fused kernel writes its scores out. A network that cannot run on meta tensors gets 64 times its largest
    input.
    """
    meta = {name: tensor.to("meta") for name, tensor in inputs.items()}
    try:
        with torch.no_grad(), _FusedAttention(), _LiveBytes() as live:
            module(**meta)
    except (RuntimeError, TypeError, ValueError):
        return 64 * max(tensor.nbytes for tensor in inputs.values())
    return int(live.peak)


class _FusedAttention(TorchFunctionMode):
    """Answers attention with an empty output: the meta device would take it apart into its (N, N) scores."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = _attention_inputs(*args, **(kwargs or {}))
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


def _attention_inputs(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query, key, value


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operators make, and what is left of them when they die."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    size = leaf.nbytes
                    self._live += size
                    self.peak = max(self.peak, self._live)
                    weakref.finalize(leaf, self._forget, size)
        return result

    def _forget(self, size: int) -> None:
        self._live -= size
