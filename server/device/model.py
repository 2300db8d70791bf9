"""What the server serves: one checkpoint's backbones, its schedules and what they cost on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rmd.backbones.base import Backbone, EagerExecutor
from rmd.cascade import Cascade
from rmd.size import Size
from server.core.latency import STUDENT, LatencyTable, StationKey

TEACHER_SCHEDULE = "teacher"
EAGER_TEACHER = "eager"
COMPILED_TEACHER = "compiled"


@dataclass(frozen=True)
class Schedule:
    """One way through the model: a cascade and the weights (lane) that it runs on."""

    name: str
    cascade: Cascade
    lane: str

    @property
    def guided(self) -> bool:
        """True where guidance is applied at inference: then guidance_scale and negative_prompt mean something."""
        return self.cascade.guidance_scale != 1.0

    @property
    def hands_over(self) -> bool:
        """True where a step changes size, so that noise_intensity means something."""
        return len(self.cascade.stages) > 1


@dataclass(frozen=True)
class TeacherBaseline:
    """The teacher's own latency for one picture on this machine, timed at start at batch 1.

    ``seconds = encode + steps * guided step + decode``. ``kind`` is "eager", or "compiled" for the same network
    through engines: the first says what this server gains over plain use of the teacher, the second what is left
    when the teacher is compiled too.
    """

    kind: str
    steps: int
    guided_step_seconds: float
    encode_seconds: float
    decode_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds of one picture."""
        return self.encode_seconds + self.steps * self.guided_step_seconds + self.decode_seconds


@dataclass
class ServedModel:
    """A checkpoint, ready to run.

    ``lanes`` maps weights to backbones. Text and decoding use the student's, which distillation leaves as they were.
    """

    model_id: str
    created: int
    lanes: Mapping[str, Backbone]
    schedules: Mapping[str, Schedule]
    default: str
    latencies: LatencyTable
    executor_kind: str = "eager"
    started_baselines: tuple[TeacherBaseline, ...] = ()
    memory_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def backbone(self) -> Backbone:
        """The student."""
        return self.lanes[STUDENT]

    @property
    def films(self) -> bool:
        """True where it makes films, not pictures."""
        return self.backbone.media == "video"

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The finished sizes on offer, smallest first."""
        return tuple(sorted({schedule.cascade.full_size for schedule in self.schedules.values()}))

    @property
    def baselines(self) -> tuple[TeacherBaseline, ...]:
        """The teacher's latencies by kind.

        The one whose executor also serves schedule 'teacher' follows the real guided steps, so that a machine that
        was busy at start, or is busy now, does not bend the speed-up for ever.
        """
        teacher = self.schedules.get(TEACHER_SCHEDULE)
        if teacher is None:
            return self.started_baselines
        served = EAGER_TEACHER if isinstance(self.lanes[teacher.lane].executor, EagerExecutor) else COMPILED_TEACHER
        step = self.latencies.seconds(StationKey("denoise", teacher.lane, teacher.cascade.full_size), 2)
        return tuple(
            replace(baseline, guided_step_seconds=step) if baseline.kind == served else baseline
            for baseline in self.started_baselines
        )

    def speedups(self, compute_seconds: float) -> dict[str, float]:
        """Return the teacher's seconds over ``compute_seconds`` by kind of baseline; empty where none was measured."""
        if compute_seconds <= 0:
            return {}
        return {baseline.kind: baseline.seconds / compute_seconds for baseline in self.baselines}

    def stations(self) -> tuple[StationKey, ...]:
        """Return every station of the schedules on offer, in the order a picture meets them."""
        keys = {
            StationKey("denoise", schedule.lane, step.size): None
            for schedule in self.schedules.values()
            for step in schedule.cascade.steps
        }
        denoise = sorted(keys, key=lambda key: (key.lane != STUDENT, key.size))
        decode = [StationKey("decode", size=size) for size in self.sizes]
        return (StationKey("encode"), *denoise, *decode)

    def costs(self, cascade: Cascade, lane: str, shared: bool = False) -> tuple[float, ...]:
        """Return the expected seconds of one picture from each step to its end; the last entry is decoding.

        Args:
            shared: its part of batches in the best company, instead of alone.
        """
        rows = 1 if cascade.guidance_scale == 1.0 else 2
        seconds = self.latencies.shared if shared else self.latencies.seconds
        costs = [seconds(StationKey("decode", size=cascade.full_size), 1)]
        for step in reversed(cascade.steps):
            costs.append(costs[-1] + seconds(StationKey("denoise", lane, step.size), rows))
        return tuple(reversed(costs))
