"""A checkpoint on its device: the networks that an engine runs, and what they cost here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engines.run.live import LiveExecutor
from rmd.backbones.base import Backbone
from server.core.card import TEACHER_SCHEDULE, ModelCard, TeacherBaseline
from server.core.costs import CostTable
from server.core.stages import ALL, Stages
from server.core.stations import STUDENT, TEACHER
from server.device.baseline import EagerTeacher, compiled_baseline


@dataclass
class DeviceModel:
    """A loaded model.

    Attributes:
        lanes: weights -> backbone. Text and decoding use the student's, which distillation leaves as they were.
        live: by lane, the executors that take engines over as they are built; empty where all runs eager for good.
        teacher: the eager teacher, to be timed again when there is time; None where it is not measured.
        max_batch: widest batch that is tried where no engine fixes it.
        stages: what it is loaded for; other networks have no weights.
    """

    card: ModelCard
    lanes: Mapping[str, Backbone]
    costs: CostTable
    live: Mapping[str, LiveExecutor]
    teacher: EagerTeacher | None = None
    max_batch: int = 8
    stages: Stages = ALL

    def baselines(self) -> tuple[TeacherBaseline, ...]:
        """Return the teacher's latencies as they are known now."""
        known = [] if self.teacher is None else [self.teacher.baseline()]
        schedule = self.card.schedules.get(TEACHER_SCHEDULE)
        if known and schedule is not None:
            size, live = schedule.cascade.full_size, self.live.get(TEACHER)
            if live is not None and live.buckets("denoiser", size):
                # Timed in the same minutes, so as steady as the eager one.
                steps, spread = schedule.cascade.num_steps, known[0].spread
                known.append(compiled_baseline(self.costs, size, steps, spread, self.card.place))
        return tuple(known)

    @property
    def backbone(self) -> Backbone:
        """The student."""
        return self.lanes[STUDENT]


@dataclass
class Loaded:
    """All that one engine serves.

    Attributes:
        models: at least one.
        missing: why each checkpoint that could not be loaded could not, by model id.
    """

    models: Sequence[DeviceModel]
    missing: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Have all models learn in one table: they share one device and one scheduler."""
        self.costs = self.models[0].costs
        for model in self.models[1:]:
            for key, widths in model.costs.table().items():
                self.costs.replace(key, widths)
            model.costs = self.costs

    @property
    def stages(self) -> Stages:
        """What all of them are loaded for."""
        return self.models[0].stages
