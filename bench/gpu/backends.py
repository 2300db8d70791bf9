"""An engine backend by the interface that serves: built, loaded, run, replayed, refitted."""

from __future__ import annotations

from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.case import Context, Row
from engines.build.measure import median_latency
from engines.build.one import build_engine
from engines.compilers import get_compiler
from engines.compilers.base import EngineRequest
from engines.compilers.engine import Engine
from engines.run.accuracy import relative_l2
from engines.run.cuda_graphs import as_it_runs
from engines.store import EngineStore
from engines.target import this_machine
from engines.weights.bank import WeightBank
from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import tiny_config
from rmd.dtypes import dtype_name
from rmd.size import Size

BATCHES = (1, 2, 4)
_SIZE = Size.square(64)
_FAMILY = "sd3"


def backend(context: Context, name: str) -> Iterator[Row]:
    """A small SD3 transformer of random weights at every batch; its reason where a backend is not there."""
    capabilities = get_compiler(name).capabilities(context.device.type)
    if not capabilities.available:
        yield {"what": name, "not here": capabilities.reason}
        return
    with TemporaryDirectory(prefix="rmd-backend-") as folder:
        for batches in [BATCHES] if capabilities.profiles else [(batch,) for batch in BATCHES]:
            yield from _engine(context, name, EngineStore(folder), batches)


def _engine(context: Context, name: str, store: EngineStore, batches: tuple[int, ...]) -> Iterator[Row]:
    compiler = get_compiler(name)
    module, inputs = _network(context, 0)
    given = {key: value[: max(batches)] for key, value in inputs.items()}
    machine, dtype = this_machine(context.device), dtype_name(context.dtype)
    spec = compiler.plan(EngineRequest("denoiser", str(_SIZE), module, given, machine, dtype, "random", batches))
    manifest = build_engine(compiler, store, module, spec, given)
    yield {
        "what": f"built for batch {', '.join(map(str, batches))}",
        "ms": round(1e3 * manifest.build_seconds),
        "loaded in ms": round(1e3 * manifest.load_seconds),
        "weights": manifest.weights_mode,
    }
    bank = WeightBank(module)
    loaded = compiler.load(manifest, store.folder(spec.key), bank)
    engines = {batch: as_it_runs(loaded.at(batch)) for batch in batches}
    for batch, engine in engines.items():
        error = relative_l2(engine, module, inputs)  # replayed as a CUDA graph, where it serves so
        latency = 1e3 * median_latency(engine)
        yield {"what": f"batch {batch}", "ms": round(latency, 3), "relative L2": float(f"{error:.2e}")}
    if batches[-1] == max(BATCHES):
        yield {"what": "with other weights", **_refit(context, engines[max(BATCHES)], inputs)}
    for engine in engines.values():
        engine.unload()
    bank.close()


def _network(context: Context, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = get_backbone(_FAMILY).from_config(tiny_config(_FAMILY), context.dtype, context.device)
        module = backbone.component_modules()["denoiser"].requires_grad_(False)
        for parameter in module.parameters():  # zero biases and norms of ones would all look alike to a refit
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        return module, backbone.example_inputs("denoiser", _SIZE, max(BATCHES))


def _refit(context: Context, engine: Engine, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The error against another network after its weights were given to the engine, or why it does not take them."""
    other, _ = _network(context, 1)
    try:
        engine.refit(dict([*other.named_parameters(), *other.named_buffers()]))
    except ValueError as error:
        return {"refused": str(error)}
    return {"relative L2": float(f"{relative_l2(engine, other, inputs):.2e}")}
