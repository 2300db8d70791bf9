"""From a checkpoint folder to a :class:`ServedModel`: load, build what is missing, warm up, measure.

Runs on the device thread, so that every CUDA context and every thread pool belongs to the thread that uses it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

from engines.errors import EngineError
from engines.planning import EngineOptions
from engines.runner import EngineExecutor
from rmd.backbones.base import Backbone
from rmd.backbones.registry import get_backbone
from rmd.cascade import Cascade
from rmd.checkpoint import CASCADE_FILE, CheckpointFolder
from rmd.dtypes import parse_dtype
from rmd.size import Size
from server.core.latency import MIN_GAIN, STUDENT, TEACHER, LatencyTable, StationKey
from server.device.model import (
    COMPILED_TEACHER,
    EAGER_TEACHER,
    TEACHER_SCHEDULE,
    Schedule,
    ServedModel,
    TeacherBaseline,
)
from server.front.service import Progress
from server.start.compiled import attach_engines, build_missing, choose_engines
from server.start.settings import ServerSettings

log = logging.getLogger("rmd.server")

Report = Callable[[Progress], None]

# Widths are chosen by these timings, so one slice of time lost to a neighbour must not decide them.
_REPEATS = 10
_PATIENCE_SECONDS = 0.5
_BASELINE_REPEATS = 10
_BASELINE_PATIENCE_SECONDS = 5.0
_STEADY = 1.5


def load_model(settings: ServerSettings, report: Report) -> ServedModel:
    """Load, warm and measure everything the server offers.

    Args:
        settings: which checkpoint, device and engines.
        report: called with the progress, which ``/health/ready`` shows.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be used; the message names the file and the way out.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    report(Progress(0, 4, "reading the checkpoint"))
    checkpoint = CheckpointFolder.read(settings.checkpoint)
    options = choose_engines(settings, checkpoint)
    if options is not None and settings.build_missing:
        options = build_missing(settings, options, lambda done, total, text: report(Progress(done, total, text)))

    report(Progress(1, 4, "loading the weights"))
    dtype = parse_dtype(settings.dtype, settings.device)
    backbone = get_backbone(checkpoint.backbone_name).load(checkpoint.path, dtype=dtype, device=settings.device)
    teacher = _load_teacher(settings, checkpoint, dtype)
    lanes, schedules = {STUDENT: backbone}, {n: Schedule(n, c, STUDENT) for n, c in checkpoint.cascades.items()}
    teacher_cascade = checkpoint.teacher_cascade
    if teacher is not None and teacher_cascade is not None and settings.serve_teacher:
        lanes[TEACHER] = teacher
        schedules[TEACHER_SCHEDULE] = Schedule(TEACHER_SCHEDULE, teacher_cascade, TEACHER)

    report(Progress(2, 4, "timing the eager teacher"))
    baselines: list[TeacherBaseline] = []
    if settings.measure_teacher and checkpoint.teacher is not None:
        # Its own network, or the student's, which has its shape. Eager: nothing has been attached yet.
        baselines.append(_eager_baseline(teacher or backbone, checkpoint, checkpoint.teacher.steps))

    report(Progress(3, 4, "loading engines" if options else "preparing"))
    memory = _memory(lanes)
    if options is not None:
        memory |= attach_engines(settings, options, checkpoint, backbone).memory()
        if TEACHER in lanes:
            memory |= _attach_teacher(settings, options, checkpoint, lanes[TEACHER])
    model = ServedModel(
        model_id=settings.model_id,
        created=int((checkpoint.path / CASCADE_FILE).stat().st_mtime),
        lanes=lanes,
        schedules=schedules,
        default=checkpoint.default,
        latencies=LatencyTable({}),
        executor_kind=options.backend if options else "eager",
        memory_bytes=memory,
    )
    stations = (*model.stations(), *_preview_stations(model))
    measured: dict[StationKey, dict[int, float]] = {}
    for done, key in enumerate(stations):
        report(Progress(done, len(stations), f"warming up {key.label}"))
        measured[key] = _measure_station(model, key, settings.max_batch)
    model.latencies = LatencyTable(measured)
    if baselines and TEACHER in lanes and isinstance(lanes[TEACHER].executor, EngineExecutor):
        baselines.append(_compiled_baseline(model, schedules[TEACHER_SCHEDULE].cascade))
    model.started_baselines = tuple(baselines)
    return model


def _load_teacher(settings: ServerSettings, checkpoint: CheckpointFolder, dtype: torch.dtype) -> Backbone | None:
    """Load the teacher, eager, where its folder is at hand and it is wanted."""
    path = checkpoint.teacher_path
    if path is None or not (settings.serve_teacher or settings.measure_teacher):
        return None
    if not path.is_dir():
        log.warning("the teacher's folder %s is not here: schedule '%s' is not offered", path.name, TEACHER_SCHEDULE)
        return None
    return get_backbone(checkpoint.backbone_name).load(path, dtype=dtype, device=settings.device)


def _attach_teacher(
    settings: ServerSettings, options: EngineOptions, checkpoint: CheckpointFolder, teacher: Backbone
) -> dict[str, int]:
    """Run the teacher through the student's engines, which hold no weights of their own, where they allow it."""
    try:
        executor = attach_engines(settings, options, checkpoint, teacher, foreign=True)
    except EngineError as error:
        log.warning("the teacher runs eager: %s", error)
        return {}
    return {f"{TEACHER} {name}": held for name, held in executor.memory().items()}


def _memory(lanes: Mapping[str, Backbone]) -> dict[str, int]:
    """Return the bytes of the eager weights by lane and component."""
    return {
        name if lane == STUDENT else f"{lane} {name}": sum(p.numel() * p.element_size() for p in module.parameters())
        for lane, backbone in lanes.items()
        for name, module in backbone.component_modules().items()
    }


# -- measuring -----------------------------------------------------------------------------------------------------


def _preview_stations(model: ServedModel) -> tuple[StationKey, ...]:
    """Return the decode stations below full size, where partial pictures are made."""
    sizes = {step.size for schedule in model.schedules.values() for step in schedule.cascade.steps}
    return tuple(StationKey("decode", size=size) for size in sorted(sizes - set(model.sizes)))


def _measure_station(model: ServedModel, key: StationKey, max_batch: int) -> dict[int, float]:
    """Time a station's batches; the first run of each is warm-up.

    With engines: every bucket, all of which have to be warm. Eager: doubling while that pays. Either way no wider
    than memory allows. Of the teacher's denoiser always two rows, which are one guided picture's.

    Raises:
        torch.OutOfMemoryError: not even the narrowest batch fits.
    """
    backbone = model.lanes[key.lane]
    buckets = _engine_buckets(backbone, key)
    batches = buckets or tuple(2**k for k in range(max_batch.bit_length()) if 2**k <= max_batch)
    if key.kind == "denoise" and key.lane == TEACHER:
        batches = tuple(sorted({*batches, 2}))
    measured: dict[int, float] = {}
    best_rate = 0.0
    for batch in batches:
        try:
            measured[batch] = _fastest(_station_work(model, key, batch), backbone.device)
        except torch.OutOfMemoryError:
            if not measured:
                raise
        if batch not in measured:
            torch.cuda.empty_cache()  # out here, where no traceback keeps the failed batch's tensors
            log.warning("%s: no memory for a batch of %d; at most %d share one", key.label, batch, max(measured))
            break
        rate = batch / measured[batch]
        if not buckets and rate < best_rate * MIN_GAIN:
            break
        best_rate = max(best_rate, rate)
    return measured


def _engine_buckets(backbone: Backbone, key: StationKey) -> tuple[int, ...]:
    if not isinstance(backbone.executor, EngineExecutor):
        return ()
    component = {"encode": "text_encoder", "denoise": "denoiser", "decode": "decoder"}[key.kind]
    return backbone.executor.buckets(component, key.size)


def _station_work(model: ServedModel, key: StationKey, batch: int) -> Callable[[], object]:
    if key.kind == "encode":
        prompts = [f"a red rocket, number {i}" for i in range(batch)]
        return lambda: model.backbone.encode_prompts(prompts)
    assert key.size is not None
    backbone, size = model.lanes[key.lane], key.size
    if key.kind == "decode":
        latents = torch.zeros(batch, *backbone.latent_shape(size), device=backbone.device)
        return lambda: backbone.decode(latents, size)
    return _denoiser_work(backbone, size, batch)


def _denoiser_work(backbone: Backbone, size: Size, rows: int) -> Callable[[], object]:
    latents = torch.randn(rows, *backbone.latent_shape(size), device=backbone.device)
    times = torch.full((rows,), 0.5, dtype=torch.float64, device=backbone.device)
    conditioning = backbone.random_conditioning(rows)
    return lambda: backbone.predict_x0(latents, times, conditioning, size)


def _timings(
    work: Callable[[], object], device: torch.device, repeats: int = _REPEATS, patience: float = _PATIENCE_SECONDS
) -> list[float]:
    """Run once to warm up, then time some runs; slow work is timed less often."""

    def seconds_of_one() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    seconds_of_one()
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < patience:
        seconds.append(seconds_of_one())
    return seconds


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Return the least of a few timings: noise on a shared machine only ever adds."""
    return min(_timings(work, device))


def _eager_baseline(backbone: Backbone, checkpoint: CheckpointFolder, steps: int) -> TeacherBaseline:
    """Time the eager teacher at batch 1: one prompt, one guided step (two rows), one decoding at full size."""
    size = checkpoint.default_cascade.full_size
    latents = torch.zeros(1, *backbone.latent_shape(size), device=backbone.device)
    guided = _timings(_denoiser_work(backbone, size, 2), backbone.device, _BASELINE_REPEATS, _BASELINE_PATIENCE_SECONDS)
    if median(guided) > _STEADY * min(guided):
        log.warning("the machine is busy: the teacher's timings spread, so the speed-ups reported are rough")
    return TeacherBaseline(
        kind=EAGER_TEACHER,
        steps=steps,
        guided_step_seconds=min(guided),
        encode_seconds=_fastest(lambda: backbone.encode_prompts(["a red rocket"]), backbone.device),
        decode_seconds=_fastest(lambda: backbone.decode(latents, size), backbone.device),
    )


def _compiled_baseline(model: ServedModel, cascade: Cascade) -> TeacherBaseline:
    """Read the compiled teacher's latency off the stations' timings."""
    size, latencies = cascade.full_size, model.latencies
    return TeacherBaseline(
        kind=COMPILED_TEACHER,
        steps=cascade.num_steps,
        guided_step_seconds=latencies.seconds(StationKey("denoise", TEACHER, size), 2),
        encode_seconds=latencies.seconds(StationKey("encode"), 1),
        decode_seconds=latencies.seconds(StationKey("decode", size=size), 1),
    )
