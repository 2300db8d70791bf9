"""What a network's passes hold and compute, found on the meta device: shapes flow, no number is made.

The passes are those of one update (:mod:`training.distill.update`), in its order; every tensor that an operation makes
is counted from then until it is freed, so gradient checkpointing, temporaries and the backward pass count as they run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rmd.backbones.base import Backbone
from rmd.size import Size
from training.distill.roles import trained_parameters


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, counts the bytes of what operations make and nothing has freed yet.

    Attributes:
        now, peak: bytes, of any device.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: set[int] = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@contextmanager
def _attention(fused: bool) -> Iterator[None]:
    """While active, attention is a fused kernel, which holds no (N, N) matrix, or plain products, which do.

    On the meta device torch would choose by no device's rules. Patched, since a function mode is off in the backward
    pass, where checkpointed blocks are run again.
    """

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        operators = torch.ops.aten
        if fused:
            made = operators._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        else:
            made = operators._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale
            )
        attended: Tensor = made[0]
        return attended

    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


@contextmanager
def _gradients_dropped(module: nn.Module) -> Iterator[None]:
    """Gradients are the optimiser's to hold (:meth:`training.distill.optimizer.MasterAdamW`), in float32."""
    handles = [
        parameter.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
        for parameter in trained_parameters(module).values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def passes_peak(
    backbone: Backbone,
    student: nn.Module,
    teacher: nn.Module,
    fake: nn.Module,
    groups: Sequence[tuple[Size, int]],
    full: Size,
    *,
    guided: bool = True,
    fused_attention: bool = True,
) -> int:
    """Bytes that the passes of one micro-batch hold at most, beside weights, gradients and optimiser states.

    Args:
        backbone: on the meta device, as are the networks.
        groups: the sizes at which the student runs with gradient, and how many samples at each.
        full: where teacher and fake score see them all.
        guided: whether the teacher runs conditional and unconditional.
        fused_attention: as on a GPU; plain products otherwise (:func:`training.runtime.attention.training_attention`).
    """
    count = sum(samples for _, samples in groups)

    def score(network: nn.Module, rows: int) -> Tensor:
        return _call(backbone, network, full, rows)

    known = [p for module in (student, teacher, fake) for p in module.parameters()]
    with _gradients_dropped(student), _gradients_dropped(fake), _attention(fused_attention), LiveBytes(known) as live:
        predictions = [_call(backbone, student, size, samples) for size, samples in groups]
        with torch.no_grad():
            score(teacher, 2 * count if guided else count)
            score(fake, count)
        _backward(predictions)
        del predictions
        _backward([score(fake, count)])
    peak: int = live.peak
    return peak


def forward_flop(backbone: Backbone, network: nn.Module, size: Size) -> int:
    """Floating point operations of one sample's forward pass."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _attention(fused=False), counter:
        _call(backbone, network, size, 1)
    return int(counter.get_total_flops())


def _call(backbone: Backbone, network: nn.Module, size: Size, samples: int) -> Tensor:
    latents = torch.empty(samples, *backbone.latent_shape(size), device="meta")
    t = torch.empty(samples, device="meta")
    return backbone.predict_output(latents, t, backbone.random_conditioning(samples), size, denoiser=network)


def _backward(predictions: Sequence[Tensor]) -> None:
    losses = [(prediction - torch.empty_like(prediction)).square().mean() for prediction in predictions]
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]


def with_offload(passes: Callable[[], int], offloaded: bool) -> int:
    """The peak where saved activations wait on the CPU: what is kept for the backward pass counts there, not here."""
    if not offloaded:
        return passes()
    with torch.autograd.graph.saved_tensors_hooks(_elsewhere, _back):
        return passes()


def _elsewhere(tensor: Tensor) -> tuple[torch.Size, torch.dtype] | Tensor:
    return tensor if isinstance(tensor, nn.Parameter) else (tensor.shape, tensor.dtype)


def _back(kept: tuple[torch.Size, torch.dtype] | Tensor) -> Tensor:
    return kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1], device="meta")
