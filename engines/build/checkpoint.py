"""Builds the engines that a checkpoint lacks, in parallel where that helps, and measures each before it counts."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from engines.build.progress import BuildProgress as BuildProgress
from engines.build.progress import Report
from engines.compilers.base import Compiler, Engine, Stopwatch, example_tensors
from engines.errors import EngineAccuracyError, EngineError, NotEnoughDisk
from engines.manifest import Manifest
from engines.plan.checkpoint import CheckpointPlan, EngineOptions, PlannedEngine, load_backbone
from engines.plan.memory import MemoryPlan, available_bytes, weight_bytes
from engines.run.accuracy import (
    check_accuracy,
    first_rows,
    tolerance_of,
    worst_relative_l2,
)
from engines.run.accuracy import relative_l2 as relative_l2
from engines.run.buckets import Place, place_of
from engines.spec import EngineSpec
from engines.store import EngineStore
from engines.weights.bank import WeightBank
from rmd.checkpoint import CheckpointFolder

log = logging.getLogger(__name__)

_OVERHEAD_BYTES = 1 << 30  # of a process with torch and, on a GPU, its context
_CUDA_WORKERS = 4  # the host compiles most of the time; more would wait for each other on the GPU
_MEASURE_SECONDS = 0.4
_MEASURE_RUNS = (5, 50)


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


def plan_checkpoint(
    checkpoint: Path | str,
    backend: str = "auto",
    device: str = "cpu",
    dtype: str = "auto",
    buckets: Sequence[int] | None = None,
    decoder: Path | str | None = None,
) -> CheckpointPlan:
    """Every engine that the checkpoint's schedules need, the teacher's size included.

    Raises:
        BackendUnavailable: the named backend cannot build here.
        EngineError: a wrong bucket or dtype.
        FileNotFoundError, ValueError: the checkpoint cannot be used.
    """
    options, note = EngineOptions.resolve(backend, device, dtype, buckets)
    if note:
        log.warning(note)
    return CheckpointPlan.read(checkpoint, options, decoder)


def missing_engines(plan: CheckpointPlan, store: EngineStore) -> list[PlannedEngine]:
    """The planned engines that the store lacks, or holds broken."""
    return [engine for engine in plan.engines if not store.has(engine.spec.key)]


def build_checkpoint(
    checkpoint: Path | str,
    store: EngineStore | Path | str,
    backend: str = "auto",
    progress: Report | None = None,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    buckets: Sequence[int] | None = None,
    workers: int | None = None,
    announce: Callable[[str], None] | None = None,
    while_serving: bool = False,
    decoder: Path | str | None = None,
) -> BuildReport:
    """Build what is missing, then measure it with nothing else running.

    Where a backend fails, "auto" goes on with the next (TensorRT, AOTInductor, eager) and logs why: with all engines,
    or beside a server with those that failed. A backend that was named fails with the error.

    Args:
        checkpoint: folder.
        store: where engines go.
        backend: a backend's name or "auto".
        progress: told after each engine.
        device, dtype, buckets: see :class:`~engines.plan.checkpoint.EngineOptions`.
        workers: processes that compile at once; None: as many as cores and memory allow.
        announce: given the memory plan and the choice of backend as text, before anything is built.
        while_serving: for a server that runs meanwhile: those engines first that save it most, none measured (its own
            batches tell what they cost), and one that fails does not stop the others.
        decoder: a small decoder's folder or "full"; what the checkpoint names when None.

    Raises:
        NotEnoughMemory: the engines would not fit the device; nothing was built.
        NotEnoughDisk: the disk filled up; engines that were complete stay.
        EngineAccuracyError: an engine's output is not eager's; it was not published.
        EngineError: anything else that the user can mend; the message says how.
    """
    watch = Stopwatch()
    store = store if isinstance(store, EngineStore) else EngineStore(store)
    ladder, note = EngineOptions.ladder(backend, device, dtype, buckets)
    folder = CheckpointFolder.read(checkpoint).with_decoder(decoder)
    if while_serving:  # what runs eager needs no engine for it
        ladder = tuple(options for options in ladder if options.backend != "eager") or ladder
    reports: list[BuildReport] = []
    places: set[Place] | None = None
    onward = _Onward(progress or (lambda _: None))
    for options, lower in zip(ladder, (*ladder[1:], None), strict=True):
        plan = CheckpointPlan(folder, options)
        try:
            report = _build_with(plan, store, places, note, onward, workers, announce, while_serving)
        except NotEnoughDisk:
            raise
        except EngineError as error:
            if lower is None:
                raise
            reason = str(error)
            if while_serving:  # what it did build is in service by now
                lacking = {place_of(engine.component, engine.size) for engine in missing_engines(plan, store)}
                places = lacking if places is None else places & lacking
        else:
            reports.append(report)
            if not report.failed or lower is None:
                break
            reason = f"{report.failed[0].title}: {report.failed[0].error}"
            places = {failure.place for failure in report.failed}
        assert lower is not None
        note = f"{options.backend} is given up for {lower.backend}: {reason}"
        log.warning("%s", note)
        onward.step_down()
    if not while_serving:
        _measure_untimed(plan, store)
    built = tuple(store.get(manifest.key) or manifest for report in reports for manifest in report.built)
    whole = replace(reports[-1], built=built, reused=reports[0].reused, seconds=watch.seconds)
    if whole.unpacked:
        first = whole.unpacked[0]
        log.warning("%d of %d engines: %s (%s)", len(whole.unpacked), len(built), first.note, first.spec.title)
    return whole


def _build_with(
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


class _Onward:
    """Progress that goes on where another backend was given up."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._before = self._now = 0

    def __call__(self, told: BuildProgress) -> None:
        self._now = told.done
        self._report(replace(told, done=self._before + told.done, total=self._before + told.total))

    def step_down(self) -> None:
        self._before += self._now
        self._now = 0


def _measure_untimed(plan: CheckpointPlan, store: EngineStore) -> None:
    """A build that was interrupted, or that ran beside a server, left engines without times."""
    manifests = [(engine, store.get(engine.spec.key)) for engine in plan.engines]
    untimed = [engine for engine, manifest in manifests if manifest is not None and not manifest.latency_seconds]
    if untimed:
        measure(plan, store, untimed)


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
    if workers > 1 or alone:
        from engines.build.worker import build_in_processes

        results = build_in_processes(plan, store, missing, workers)
    else:
        results = one_by_one()
    with closing(results):
        for done, (engine, error) in enumerate(results, 1):
            if error is not None:
                yield engine, error
            finished(done, engine.spec.title)


def build_engine(
    compiler: Compiler,
    store: EngineStore,
    module: nn.Module,
    spec: EngineSpec,
    inputs: Mapping[str, Tensor] | None = None,
) -> Manifest:
    """Build one engine into the store, unless it is there, and check it against eager before it is published.

    Args:
        compiler: of ``spec.backend``.
        store: where it goes.
        module: the component with its weights, on the target's device.
        spec: from the compiler's plan.
        inputs: to compare on; None takes numbers of the right shapes.

    Raises:
        EngineAccuracyError: too far from eager.
        EngineError: it cannot be compiled.
    """

    def builder(folder: Path) -> Manifest:
        manifest = compiler.build(module, spec, folder)
        watch = Stopwatch()
        bank = WeightBank(module)
        try:
            engine = compiler.load(manifest, folder, bank)
            seconds = watch.seconds
            error = worst_relative_l2(engine, module, inputs)
            engine.unload()
            check_accuracy(spec, error)
        except EngineAccuracyError as inaccurate:
            raise EngineAccuracyError(f"{inaccurate}; it is not published. Use --backend eager") from None
        finally:
            bank.close()
        return manifest.updated(relative_l2=error, tolerance=tolerance_of(spec), load_seconds=seconds)

    return store.build(spec.key, builder)


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


def as_it_runs(engine: Engine, cuda_graphs: bool = True) -> Engine:
    """The engine as it serves: replayed as a CUDA graph on a GPU, whether it is compiled code or the network itself."""
    if not cuda_graphs or engine.manifest.spec.target.device != "cuda":
        return engine
    from engines.run.cuda_graphs import GraphedEngine

    return GraphedEngine(engine)


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
