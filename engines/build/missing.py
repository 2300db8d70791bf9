"""Builds with one backend what the store lacks, in parallel where that helps."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

from engines.build.one import build_engine
from engines.build.progress import BuildProgress, Report
from engines.build.worker import build_in_processes
from engines.errors import EngineError, NotEnoughDisk
from engines.manifest import Manifest
from engines.plan.checkpoint import CheckpointPlan, PlannedEngine, load_backbone
from engines.plan.memory import MemoryPlan, available_bytes, weight_bytes
from engines.run.buckets import Place, place_of
from engines.stopwatch import Stopwatch
from engines.store import EngineStore

_OVERHEAD_BYTES = 1 << 30  # of a process with torch and, on a GPU, its context
_CUDA_WORKERS = 4  # the host compiles most of the time; more would wait for each other on the GPU


@dataclass(frozen=True)
class Failure:
    """An engine that could not be built, why, and where it was to run."""

    title: str
    error: EngineError
    place: Place


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        built: manifests of new engines, with their latencies.
        reused: how many were there already.
        seconds: wall-clock of all of it.
        note: one sentence when another backend than the first choice was taken.
        failed: what could not be built with any backend.
    """

    built: tuple[Manifest, ...]
    reused: int
    seconds: float
    backend: str
    memory: MemoryPlan
    note: str = ""
    failed: tuple[Failure, ...] = ()

    @property
    def unpacked(self) -> tuple[Manifest, ...]:
        """Engines that were to have their weights as kernels read them, and could not: they are slower."""
        return tuple(manifest for manifest in self.built if manifest.weights_mode != manifest.spec.weights_mode)


def build_missing(
    plan: CheckpointPlan,
    store: EngineStore,
    places: set[Place] | None,
    note: str,
    progress: Report,
    workers: int | None,
    announce: Callable[[str], None] | None,
    while_serving: bool,
) -> BuildReport:
    """Build with one backend what is missing at these places, or at all."""
    watch = Stopwatch()
    engines = [e for e in plan.engines if places is None or place_of(e.component, e.size) in places]
    missing = [engine for engine in engines if not store.has(engine.spec.key)]
    count = _workers(plan, len(missing), workers)
    memory = plan.memory(count)
    if announce is not None:
        announce("\n".join([*([note] if note else []), memory.describe()]))
    failed: list[Failure] = []
    if missing:
        memory.check()
        store.check_places(engine.spec.key for engine in missing)
        # Large batches take longest to compile, so they start first and no worker ends alone with one.
        missing.sort(key=plan.serving_order if while_serving else lambda engine: -engine.spec.batch)
        for engine, error in _build_all(plan, store, missing, count, watch, progress):
            if not while_serving:
                raise error
            failed.append(Failure(engine.spec.title, error, place_of(engine.component, engine.size)))
    built = [store.get(engine.spec.key) for engine in missing]
    return BuildReport(
        built=tuple(manifest for manifest in built if manifest is not None),
        reused=len(engines) - len(missing),
        seconds=watch.seconds,
        backend=plan.options.backend,
        memory=memory,
        note=note,
        failed=tuple(failed),
    )


def _workers(plan: CheckpointPlan, engines: int, asked: int | None) -> int:
    if not plan.compiler.capabilities(plan.target.device).parallel:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    weights = [weight_bytes(module) for module in plan.modules.values()]
    fitting = available_bytes("cpu") // (3 * max(weights) + _OVERHEAD_BYTES)
    if plan.target.device == "cuda":
        # Each worker holds the whole model on the GPU, and runs its largest part beside an engine of it.
        cores = min(cores, _CUDA_WORKERS)
        on_device = sum(weights) + max(weights) + plan.memory().workspace + _OVERHEAD_BYTES
        fitting = min(fitting, available_bytes(plan.options.device) // on_device)
    return max(1, min(asked or cores, engines, fitting))


def _build_all(
    plan: CheckpointPlan,
    store: EngineStore,
    missing: list[PlannedEngine],
    workers: int,
    watch: Stopwatch,
    report: Report,
) -> Generator[tuple[PlannedEngine, EngineError], None, None]:
    """Builds ``missing`` in this order; yields what failed, and why."""

    def finished(done: int, title: str) -> None:
        left = watch.seconds / done * (len(missing) - done) if done else None
        report(BuildProgress(done, len(missing), title, watch.seconds, left))

    def one_by_one() -> Generator[tuple[PlannedEngine, EngineError | None], None, None]:
        loaded = CheckpointPlan(plan.checkpoint, plan.options, load_backbone(plan.checkpoint, plan.options))
        for engine in missing:
            inputs = loaded.typical_inputs(engine.component, engine.size, engine.spec.batch)
            try:
                build_engine(plan.compiler, store, loaded.modules[engine.component], engine.spec, inputs)
            except NotEnoughDisk:
                raise
            except EngineError as error:
                yield engine, error
            except Exception as error:  # compilers raise what they like
                yield engine, EngineError(f"{type(error).__name__}: {error}")
            else:
                yield engine, None

    finished(0, missing[0].spec.title)
    # On a GPU in a process of its own even alone: a compiler that crashes there takes nothing else with it, and all
    # of its memory is given back.
    alone = plan.target.device == "cuda" and not plan.compiler.on_the_spot("cuda")
    results = build_in_processes(plan, store, missing, workers) if workers > 1 or alone else one_by_one()
    with closing(results):
        for done, (engine, error) in enumerate(results, 1):
            if error is not None:
                yield engine, error
            finished(done, engine.spec.title)
