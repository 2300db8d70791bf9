"""From a checkpoint folder to a :class:`DeviceModel`: load the weights, take over what engines there are, measure.

Runs on the device thread, so that every CUDA context and every thread pool belongs to the thread that uses it.
Nothing is built here: what has no engine yet runs eager, and its station changes over when one has been built.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engines.compilers import get_compiler
from engines.errors import EngineError
from engines.plan.checkpoint import CheckpointPlan, missing_engines
from engines.plan.options import EngineOptions
from engines.run.buckets import place_of
from engines.run.choice import loadable_ladder
from engines.run.executor import missing_message
from engines.run.live import LiveExecutor
from engines.store import EngineStore
from rmd.backbones.base import Backbone
from rmd.backbones.family import DiffusersBackbone
from rmd.backbones.registry import get_backbone
from rmd.checkpoint import CASCADE_FILE, CheckpointFolder
from rmd.dtypes import parse_dtype
from server.core.card import TEACHER_SCHEDULE, ModelCard, Schedule
from server.core.costs import CostTable
from server.core.stages import ALL, stations_in
from server.core.stations import STUDENT, TEACHER
from server.device.baseline import EagerTeacher
from server.device.measuring import COMPONENTS, compiled_buckets, measure_station
from server.device.model import DeviceModel, Loaded
from server.device.probe import prove
from server.device.settings import EngineSettings

log = logging.getLogger("rmd.server")

Report = Callable[[int, int, str], None]

_EAGER = "eager"
_KEPT_BYTES = 1 << 30  # of the eager teacher's denoiser, kept beside its engines so that it can be timed again


def load_models(settings: EngineSettings, report: Report) -> Loaded:
    """Load every checkpoint. One that cannot be loaded is named, and the others are served.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: none of them can be loaded; the message says why not the first.
        torch.AcceleratorError: the device is broken.
    """
    models, missing = list[DeviceModel](), dict[str, str]()
    first: Exception | None = None
    for index, (_, model_id) in enumerate(settings.checkpoints):
        try:
            models.append(load_model(settings, report, index))
        except torch.AcceleratorError:
            raise
        except (ValueError, OSError, RuntimeError) as error:
            first = first or error
            missing[model_id] = f"{type(error).__name__}: {error}"
            log.error("the model '%s' is not served: %s", model_id, missing[model_id])
    if first is not None and not models:
        raise first
    return Loaded(models, missing)


def load_model(settings: EngineSettings, report: Report, index: int = 0) -> DeviceModel:
    """Load, warm and measure one of the checkpoints.

    Args:
        settings: which checkpoints, device and engines.
        report: called with (done, total, what), which ``/health/ready`` shows.
        index: of the checkpoint.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be used; the message names the file and the way out.
        NonFiniteError: its networks return NaN or infinity.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    folder, model_id = settings.checkpoints[index]
    report(0, 4, f"reading {model_id}")
    checkpoint = CheckpointFolder.read(folder).with_decoder(settings.decoder)
    ladder = _choose_engines(settings, checkpoint)

    report(1, 4, f"loading the weights of {model_id}")
    dtype = parse_dtype(settings.dtype, settings.device)
    backbone = _load(checkpoint, checkpoint.path, dtype, settings)
    teacher = _load_teacher(settings, checkpoint, dtype)
    lanes, schedules = {STUDENT: backbone}, {n: Schedule(n, c, STUDENT) for n, c in checkpoint.cascades.items()}
    teacher_cascade = checkpoint.teacher_cascade
    if teacher is not None and teacher_cascade is not None and settings.serve_teacher:
        lanes[TEACHER] = teacher
        schedules[TEACHER_SCHEDULE] = Schedule(TEACHER_SCHEDULE, teacher_cascade, TEACHER)
    card = _card(model_id, checkpoint, backbone, schedules, place=model_id if index else "")

    report(2, 4, f"timing the eager teacher of {model_id}")
    eager = None
    if settings.measure_teacher and checkpoint.teacher is not None and {"high", "decode"} <= settings.stages:
        # Its own network, or the student's, which has its shape. Eager: no engine has been taken over yet.
        eager = EagerTeacher(teacher or backbone, checkpoint.default_cascade.full_size, checkpoint.teacher.steps)

    report(3, 4, "loading engines" if ladder else "preparing")
    memory = _memory(lanes)
    live = _attach(settings, ladder, checkpoint, lanes, card, timed=eager is not None) if ladder else {}
    if eager is not None and live and _bytes(lanes[list(lanes)[-1]], "denoiser") > _KEPT_BYTES:
        eager.frozen = True
    card = replace(
        card,
        memory_bytes=memory | {name: held for each in live.values() for name, held in each.memory().items()},
        executor_kind=live[STUDENT].serving if live else _EAGER,
        complete=all(each.complete for each in live.values()),
    )
    model = DeviceModel(card, lanes, CostTable({}), live, eager, settings.max_batch, settings.stages)
    stations = stations_in(card, settings.stages)
    for done, key in enumerate(stations):
        report(done, len(stations), f"warming up {key.label}")
        model.costs.replace(key, measure_station(lanes, key, settings.max_batch))
    prove(model)
    compiled = {key.label: compiled_buckets(lanes[key.lane], key) for key in stations}
    model.card = replace(card, compiled=compiled, baselines=model.baselines())
    return model


def _choose_engines(settings: EngineSettings, checkpoint: CheckpointFolder) -> Sequence[EngineOptions]:
    """Return what to load engines with, the best first; none where the networks run as they are.

    Eager is one of them where it gains by being recorded, as CUDA graphs.

    Raises:
        BackendUnavailable: a backend was named that cannot be used here.
    """
    recorded = get_compiler(_EAGER).on_the_spot(settings.device.partition(":")[0])
    if settings.backend == _EAGER and not recorded:
        return ()
    common = (settings.device, settings.dtype, settings.buckets)
    ladder, note = loadable_ladder(checkpoint, EngineStore(settings.engines), settings.backend, *common)
    if note:
        log.warning("%s", note)
    return [options for options in ladder if recorded or options.backend != _EAGER]


def _load_teacher(settings: EngineSettings, checkpoint: CheckpointFolder, dtype: torch.dtype) -> Backbone | None:
    """Load the teacher, eager, where its folder is at hand and it is wanted."""
    path = checkpoint.teacher_path
    if path is None or not (settings.serve_teacher or settings.measure_teacher):
        return None
    if not path.is_dir():
        log.warning("the teacher's folder %s is not here: schedule '%s' is not offered", path.name, TEACHER_SCHEDULE)
        return None
    checkpoint.check_teacher()
    return _load(checkpoint, path, dtype, settings)


def _load(checkpoint: CheckpointFolder, folder: Path, dtype: torch.dtype, settings: EngineSettings) -> Backbone:
    """Load the checkpoint's networks or its teacher's; all schedules of a checkpoint share its decoder."""
    kind = get_backbone(checkpoint.backbone_name)
    weights = {"text_encoder", "denoiser"} if settings.stages & {"low", "high"} else set[str]()
    weights |= {"decoder"} if "decode" in settings.stages else set()
    return kind.load(folder, dtype=dtype, device=settings.device, weights=weights, decoder=checkpoint.decoder_path)


def _card(
    model_id: str, checkpoint: CheckpointFolder, backbone: Backbone, schedules: Mapping[str, Schedule], place: str
) -> ModelCard:
    sizes = {step.size for schedule in schedules.values() for step in schedule.cascade.steps}
    tokenizers = backbone.tokenizers if isinstance(backbone, DiffusersBackbone) else {}
    return ModelCard(
        model_id=model_id,
        created=int((checkpoint.path / CASCADE_FILE).stat().st_mtime),
        media=backbone.media,
        frames_per_second=backbone.frames_per_second,
        schedules=dict(schedules),
        default=checkpoint.default,
        tokens={str(size): backbone.tokens(size) for size in sizes},
        text_limit=max(tokenizers.values(), default=0),
        place=place,
        fingerprint=checkpoint.fingerprint(),
    )


def _attach(
    settings: EngineSettings,
    ladder: Sequence[EngineOptions],
    checkpoint: CheckpointFolder,
    lanes: Mapping[str, Backbone],
    card: ModelCard,
    timed: bool,
) -> dict[str, LiveExecutor]:
    """Put executors under the lanes that take over the engines there are, and those that come.

    The teacher runs through the student's engines, which hold no weights of their own, where they allow it.

    Args:
        timed: the eager teacher is to be timed now and then, so its denoiser stays, unless it is large.
    """
    live: dict[str, LiveExecutor] = {}
    store = EngineStore(settings.engines)
    for lane, backbone in lanes.items():
        plan, *below = [CheckpointPlan(checkpoint, options, backbone) for options in ladder]
        lacking = [engine.spec for engine in missing_engines(plan, store)] if lane == STUDENT else []
        if lacking:  # also where a builder runs: engines for other threads, or versions, lie there and help nobody
            log.info("%s. What has no engine runs eager", missing_message(lacking, store, plan))
        kept = timed and lane == list(lanes)[-1] and _bytes(backbone, "denoiser") <= _KEPT_BYTES
        wanted = None
        if lane == TEACHER or settings.stages != ALL:  # the teacher's texts and decoding are the student's
            here = [key for key in stations_in(card, settings.stages) if key.lane == lane]
            wanted = [
                place_of(name, key.size)
                for key in here
                for name in backbone.component_modules()
                if name.startswith(COMPONENTS[key.kind])  # there may be several text encoders
            ]
        keep_eager = frozenset({"denoiser"} if kept else ())
        try:
            executor = LiveExecutor(
                plan, store, foreign=lane == TEACHER, keep_eager=keep_eager, wanted=wanted, below=below
            )
        except EngineError as error:
            if lane != TEACHER:
                raise
            log.warning("the teacher runs eager: %s", error)
            continue
        backbone.executor = live[lane] = executor
        executor.adopt_all()
    return live


def _memory(lanes: Mapping[str, Backbone]) -> dict[str, int]:
    """Return the bytes of the eager weights by lane and component, of those that have any here."""
    return {
        name if lane == STUDENT else f"{lane} {name}": held
        for lane, backbone in lanes.items()
        for name in backbone.component_modules()
        if (held := _bytes(backbone, name))
    }


def _bytes(backbone: Backbone, component: str) -> int:
    module = backbone.component_modules()[component]
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.is_meta)
