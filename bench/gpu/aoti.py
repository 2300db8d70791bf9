"""AOTInductor in stages, each a process of its own: the last that lives says where it dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.case import Context, Row, relative_l2
from engines.compilers import get_compiler
from engines.compilers.base import EngineRequest
from engines.compilers.engine import Engine
from engines.manifest import Manifest
from engines.run.cuda_graphs import as_it_runs
from engines.spec import EngineSpec
from engines.store import EngineStore
from engines.target import this_machine
from engines.weights.bank import WeightBank
from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import tiny_config, tiny_sizes

_FAMILY = "sd3"
_INSIDE = "inside.pt2"


def compile_both(context: Context) -> Iterator[Row]:
    """A small SD3 transformer, its weights outside as engines have them, and inside as torch does it by itself."""
    module, inputs, spec = _network(context)
    store = _store(context)
    store.prune(store.keys())

    def build(folder: Path) -> Manifest:
        return get_compiler("inductor").build(module, spec, folder)

    manifest = store.build(spec.key, build)
    yield {"what": "compiled, weights outside", "ms": round(1e3 * manifest.build_seconds)}
    with torch.no_grad():
        program = torch.export.export(module, (), kwargs=dict(inputs), strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=str(store.root / _INSIDE))
    yield {"what": "compiled, weights inside"}


def load(context: Context) -> Iterator[Row]:
    """The package, and its constants given to it."""
    _engine(context)
    yield {"what": "loaded"}


def run(context: Context) -> Iterator[Row]:
    """One run, launches blocking."""
    engine, module, inputs = _engine(context)
    yield {"what": "run", "relative L2": _error(engine.run(inputs), module, inputs)}


def inside(context: Context) -> Iterator[Row]:
    """One run of the package that holds its weights."""
    module, inputs, _ = _network(context)
    package: Any = torch._inductor.aoti_load_package(str(_store(context).root / _INSIDE))
    with torch.inference_mode():
        yield {"what": "run, weights inside", "relative L2": _error(package(**inputs), module, inputs)}


def replay(context: Context) -> Iterator[Row]:
    """Recorded as a CUDA graph, and replayed."""
    engine, module, inputs = _engine(context)
    graphed = as_it_runs(engine)
    graphed.run(inputs)
    yield {"what": "replayed", "relative L2": _error(graphed.run(inputs), module, inputs)}


def _error(made: Tensor, module: nn.Module, inputs: dict[str, Tensor]) -> float:
    with torch.inference_mode():
        return relative_l2(made, module(**inputs))


def _store(context: Context) -> EngineStore:
    root = context.out / "cache" / "aoti"
    root.mkdir(parents=True, exist_ok=True)
    return EngineStore(root)


def _network(context: Context) -> tuple[nn.Module, dict[str, Tensor], EngineSpec]:
    """The same in every process."""
    torch.manual_seed(0)
    backbone = get_backbone(_FAMILY).from_config(tiny_config(_FAMILY), context.dtype, context.device)
    module = backbone.component_modules()["denoiser"].requires_grad_(False)
    size = tiny_sizes(_FAMILY)[-1]
    inputs = backbone.example_inputs("denoiser", size, 1)
    dtype = str(context.dtype).removeprefix("torch.")
    request = EngineRequest("denoiser", str(size), module, inputs, this_machine(context.device), dtype, "random")
    return module, inputs, get_compiler("inductor").plan(request)


def _engine(context: Context) -> tuple[Engine, nn.Module, dict[str, Tensor]]:
    module, inputs, spec = _network(context)
    store = _store(context)
    manifest = store.get(spec.key)
    if manifest is None:
        raise RuntimeError("the stage that compiles left no engine")
    return get_compiler("inductor").load(manifest, store.folder(spec.key), WeightBank(module)), module, inputs
