"""SDXL's decoder and denoiser at batch 1, one change at a time: layout, choice of algorithms, attention, compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.case import Context, Row, relative_l2
from bench.subjects import Subject

_ATTENTION = {
    "cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
}


def decoder(context: Context) -> Iterator[Row]:
    """As it is; ``cudnn.benchmark``; ``channels_last``; both."""
    subject = context.subject()
    module, inputs = part(subject, "decoder", subject.sizes[-1])
    last = channels_last(copy.deepcopy(module))
    cases = {}
    for benchmark in (False, True):
        for name, network in (("as it is", module), ("channels_last", last)):
            title = f"{name}, cudnn.benchmark" if benchmark else name
            cases[title] = partial(_with_benchmark, context.call(network, inputs), benchmark)
    yield from context.time(cases)


def denoiser(context: Context) -> Iterator[Row]:
    """Each size as it is; ``cudnn.benchmark``; ``channels_last``; other kernels of attention."""
    subject = context.subject()
    last = None
    for size in reversed(subject.sizes):
        module, inputs = part(subject, "denoiser", size)
        last = last or channels_last(copy.deepcopy(module))
        cases: dict[str, Callable[[], Any]] = {f"{size} as it is": context.call(module, inputs)}
        cases[f"{size} cudnn.benchmark"] = partial(_with_benchmark, context.call(module, inputs), True)
        cases[f"{size} channels_last"] = context.call(last, inputs)
        for kernel in _ATTENTION[context.device.type]:
            cases[f"{size} {kernel.name.lower()}"] = partial(_with_attention, context.call(module, inputs), kernel)
        yield from context.time(cases)


def compiled(context: Context, *components: str) -> Iterator[Row]:
    """``torch.compile``, whole graph, ``channels_last``, recorded: each size, its error, and where the time goes."""
    subject = context.subject()
    for component in components:
        sizes = reversed(subject.sizes) if component == "denoiser" else subject.sizes[-1:]
        for size in sizes:
            module, inputs = part(subject, component, size)
            eager = context.call(module, inputs)
            reference = eager().clone()
            title = f"{component} {size}"
            yield from context.time({f"{title} eager": eager})
            # Not "reduce-overhead": its graph trees fight the recording around it.
            fast = torch.compile(channels_last(module), fullgraph=True, dynamic=False)
            call = context.call(fast, inputs)
            for row in context.time({f"{title} compiled": call}):
                yield row | ({} if "failed" in row else {"relative L2": relative_l2(call(), reference)})
            yield _profile(context, component, call)


def autotuned(context: Context) -> Iterator[Row]:
    """The decoder with every kernel timed at compile time."""
    subject = context.subject()
    module, inputs = part(subject, "decoder", subject.sizes[-1])
    mode = "max-autotune-no-cudagraphs"
    call = context.call(torch.compile(channels_last(module), fullgraph=True, dynamic=False, mode=mode), inputs)
    yield from context.time({f"decoder {mode}": call})


def part(subject: Subject, component: str, size: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A component, "small decoder" being the decoder of the small one, and its inputs at batch 1."""
    name = component.removeprefix("small ")
    backbone = subject.small if name != component and subject.small is not None else subject.backbone
    return backbone.component_modules()[name], backbone.example_inputs(name, size, 1)


def channels_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _with_benchmark(call: Callable[[], Tensor], benchmark: bool) -> Tensor:
    """cuDNN chooses when a call is recorded, its first; later ones replay that choice."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = benchmark
    try:
        return call()
    finally:
        torch.backends.cudnn.benchmark = before


def _with_attention(call: Callable[[], Tensor], kernel: SDPBackend) -> Tensor:
    with sdpa_kernel(kernel):
        return call()


def _profile(context: Context, name: str, call: Callable[[], Any]) -> Row:
    """Kernels by time into ``profiles/``; the row names the file."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = context.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        call()
    path = context.out / "profiles" / f"{name.replace(' ', '-')}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    path.write_text(found.key_averages().table(sort_by=order, row_limit=40))
    return {"what": f"{name} profile", "file": path.name}
