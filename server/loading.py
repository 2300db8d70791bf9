"""From a checkpoint folder to a :class:`ServedModel`: load, build what is missing, warm up, measure.

Runs on the device thread, so that every CUDA context and every thread pool belongs to the thread that uses it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rmd.backbones.base import Backbone, EagerExecutor
from rmd.backbones.registry import get_backbone, load_checkpoint
from rmd.cascade import Cascade
from rmd.checkpoint import CASCADE_FILE, CheckpointFolder
from rmd.size import Size
from rmd.timesteps import uniform_teacher_timesteps
from server.compiled import attach_engines
from server.model import EAGER_TEACHER, TEACHER_SCHEDULE, Schedule, ServedModel, TeacherBaseline
from server.scheduling.latency import MIN_GAIN, STUDENT, TEACHER, LatencyTable, StationKey
from server.service import Progress
from server.settings import ServerSettings

log = logging.getLogger("rmd.server")

Report = Callable[[Progress], None]

_REPEATS = 3
_PATIENCE_SECONDS = 1.0


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
    dtype = getattr(torch, settings.dtype)
    checkpoint = CheckpointFolder.read(settings.checkpoint)
    executor = None
    if settings.backend != "eager":
        executor = attach_engines(settings, checkpoint, report)
    backbone, checkpoint = load_checkpoint(
        settings.checkpoint, dtype=dtype, device=settings.device, weights=executor is None
    )
    kind = "eager"
    if executor is not None:
        backbone.executor, kind = executor, executor.kind
    schedules = {name: Schedule(name, cascade, STUDENT) for name, cascade in checkpoint.cascades.items()}
    lanes: dict[str, Backbone] = {STUDENT: backbone}

    report(Progress(1, 4, "loading the teacher"))
    teacher = _load_teacher(settings, checkpoint, dtype)
    if teacher is not None and settings.serve_teacher:
        lanes[TEACHER] = teacher
        schedules[TEACHER_SCHEDULE] = Schedule(TEACHER_SCHEDULE, _teacher_cascade(checkpoint), TEACHER)

    model = ServedModel(
        model_id=settings.model_id,
        created=int((Path(settings.checkpoint) / CASCADE_FILE).stat().st_mtime),
        lanes=lanes,
        schedules=schedules,
        default=checkpoint.default,
        latencies=LatencyTable({}),
        executor_kind=kind,
        memory_bytes=_memory(lanes),
    )
    report(Progress(2, 4, "warming up"))
    stations = (*model.stations(), *_preview_stations(model))
    model.latencies = LatencyTable({key: _measure_station(model, key, settings.max_batch) for key in stations})
    report(Progress(3, 4, "timing the teacher"))
    if settings.measure_teacher:
        model.baseline = _measure_teacher(teacher or backbone, checkpoint)
    return model


def _teacher_cascade(checkpoint: CheckpointFolder) -> Cascade:
    spec = checkpoint.teacher
    assert spec is not None
    full = checkpoint.default_cascade.full_size
    return Cascade.from_steps(
        f"{checkpoint.backbone_name}-teacher",
        uniform_teacher_timesteps(spec.steps, spec.flow_shift),
        [full] * spec.steps,
        schedule_name=TEACHER_SCHEDULE,
        flow_shift=spec.flow_shift,
        guidance_scale=spec.guidance_scale,
        score_noise_intensity=0.0,
    )


def _load_teacher(settings: ServerSettings, checkpoint: CheckpointFolder, dtype: torch.dtype) -> Backbone | None:
    """Load the teacher, eager, where its folder is at hand and it is wanted."""
    path = checkpoint.teacher_path
    if path is None or not (settings.serve_teacher or settings.measure_teacher):
        return None
    if not path.is_dir():
        log.warning("the teacher's folder %s is not here: schedule '%s' is not offered", path.name, TEACHER_SCHEDULE)
        return None
    return get_backbone(checkpoint.backbone_name).load(path, dtype=dtype, device=settings.device)


def _memory(lanes: dict[str, Backbone]) -> dict[str, int]:
    """Return the bytes of the loaded weights by lane and component."""
    held: dict[str, int] = {}
    for lane, backbone in lanes.items():
        for name, module in backbone.component_modules().items():
            size = sum(p.numel() * p.element_size() for p in module.parameters() if p.device.type != "meta")
            held[name if lane == STUDENT else f"{lane} {name}"] = size
    return held


# -- measuring -----------------------------------------------------------------------------------------------------


def _preview_stations(model: ServedModel) -> tuple[StationKey, ...]:
    """Return the decode stations below full size, where partial pictures are made."""
    sizes = {step.size for schedule in model.schedules.values() for step in schedule.cascade.steps}
    return tuple(StationKey("decode", size=size) for size in sorted(sizes - set(model.sizes)))


def _measure_station(model: ServedModel, key: StationKey, max_batch: int) -> dict[int, float]:
    """Time a station's batches, doubling them while that pays; the first run of each is warm-up."""
    measured: dict[int, float] = {}
    batch, best_rate = 1, 0.0
    while batch <= max_batch:
        work = _station_work(model, key, batch)
        work()
        measured[batch] = _fastest(work, model.backbone.device)
        rate = batch / measured[batch]
        if rate < best_rate * MIN_GAIN:
            break
        best_rate = max(best_rate, rate)
        batch *= 2
    return measured


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


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Return the least of a few timings: noise on a shared machine only ever adds. Slow work is timed less often."""
    seconds: list[float] = []
    while len(seconds) < _REPEATS and sum(seconds) < _PATIENCE_SECONDS:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _measure_teacher(backbone: Backbone, checkpoint: CheckpointFolder) -> TeacherBaseline | None:
    """Time the eager teacher at batch 1 on this machine: its own network, or the student's, which has its shape."""
    if checkpoint.teacher is None:
        return None
    if not isinstance(backbone.executor, EagerExecutor):
        log.warning("the teacher is not here to be timed, so no speed-up is reported")
        return None
    size = checkpoint.default_cascade.full_size
    latents = torch.zeros(1, *backbone.latent_shape(size), device=backbone.device)
    works: dict[str, Callable[[], object]] = {
        "step": _denoiser_work(backbone, size, 2),
        "encode": lambda: backbone.encode_prompts(["a red rocket"]),
        "decode": lambda: backbone.decode(latents, size),
    }
    seconds: dict[str, float] = {}
    for name, work in works.items():
        work()
        seconds[name] = _fastest(work, backbone.device)
    return TeacherBaseline(
        kind=EAGER_TEACHER,
        steps=checkpoint.teacher.steps,
        guided_step_seconds=seconds["step"],
        encode_seconds=seconds["encode"],
        decode_seconds=seconds["decode"],
    )

