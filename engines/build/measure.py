"""Times engines as they will run, one after the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from engines.compilers.engine import Engine
from engines.compilers.examples import example_tensors
from engines.manifest import Manifest
from engines.plan.checkpoint import CheckpointPlan, PlannedEngine, load_backbone
from engines.run.accuracy import first_rows
from engines.run.cuda_graphs import as_it_runs
from engines.stopwatch import Stopwatch
from engines.store import EngineStore
from engines.weights.bank import WeightBank

_MEASURE_SECONDS = 0.4
_MEASURE_RUNS = (5, 50)


def measure(plan: CheckpointPlan, store: EngineStore, engines: Sequence[PlannedEngine] | None = None) -> list[Manifest]:
    """Time built engines one after the other and record their load seconds and median latencies.

    Args:
        plan: of the checkpoint.
        store: with the engines.
        engines: which; None: all of the plan that are built.

    Returns:
        The new manifests.
    """
    chosen = [engine for engine in (plan.engines if engines is None else engines) if store.has(engine.spec.key)]
    modules = load_backbone(plan.checkpoint, plan.options).component_modules()
    banks = {name: WeightBank(module) for name, module in modules.items()}
    updated = []
    for planned in chosen:
        manifest = store.get(planned.spec.key)
        if manifest is None:
            continue
        watch = Stopwatch()
        loaded = plan.compiler.load(manifest, store.folder(manifest.key), banks[planned.component])
        load_seconds = watch.seconds
        latencies = {}
        try:
            for batch in manifest.spec.batches:
                engine = as_it_runs(loaded.at(batch))
                try:
                    latencies[batch] = median_latency(engine)
                finally:
                    engine.unload()
        finally:
            loaded.unload()
        manifest = manifest.updated(load_seconds=load_seconds, latency_seconds=latencies)
        store.update(manifest)
        updated.append(manifest)
    for bank in banks.values():
        bank.close()
    return updated


def measure_untimed(plan: CheckpointPlan, store: EngineStore) -> None:
    """A build that was interrupted, or that ran beside a server, left engines without times."""
    manifests = [(engine, store.get(engine.spec.key)) for engine in plan.engines]
    untimed = [engine for engine, manifest in manifests if manifest is not None and not manifest.latency_seconds]
    if untimed:
        measure(plan, store, untimed)


def median_latency(engine: Engine) -> float:
    """Median wall-clock seconds of a run, warm, the device synchronised."""
    inputs = first_rows(example_tensors(engine.manifest.spec, engine.device), engine.batch)

    def synchronise() -> None:
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)

    for _ in range(3):
        engine.run(inputs)
    synchronise()
    seconds: list[float] = []
    least, most = _MEASURE_RUNS
    while len(seconds) < least or (len(seconds) < most and sum(seconds) < _MEASURE_SECONDS):
        start = time.perf_counter()
        engine.run(inputs)
        synchronise()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
