"""SDXL's 2+2 in one call, from noise to pixels: as it is served, and in the best way known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.gpu.case import Context, Row
from bench.speedup.executors import GraphReplay, TorchCompiled
from bench.subjects import Runner
from rmd.backbones.base import Backbone
from rmd.backbones.executor import EagerExecutor


def student(context: Context) -> Iterator[Row]:
    """Graphs of eager; compiled, ``channels_last``; the same with the small decoder."""
    subject = context.subject()
    cascade = subject.students["2+2"]

    def whole(executor: Any, backbone: Backbone) -> Callable[[], Any]:
        denoise = Runner(subject, executor).schedule(cascade, 1)

        def run() -> Any:
            latents = denoise()
            backbone.executor = executor
            with torch.inference_mode():
                return backbone.decode(latents, cascade.full_size)

        return run

    def recorded(executor: Any) -> Any:
        return GraphReplay(executor) if context.graphs else executor

    modules = subject.backbone.component_modules()
    yield from context.time({"2+2 as served": whole(recorded(EagerExecutor(modules)), subject.backbone)})
    for module in modules.values():
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.backends.cudnn.benchmark = True
    yield from context.time({"2+2 compiled": whole(recorded(TorchCompiled(modules)), subject.backbone)})
    if subject.small is not None:
        small = {**modules, "decoder": subject.small.component_modules()["decoder"]}
        call = whole(recorded(TorchCompiled(small)), subject.small)
        yield from context.time({f"2+2 compiled, {subject.small_decoder}": call})
