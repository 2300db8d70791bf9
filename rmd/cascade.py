"""Cascades: which step runs at which size and time.

A cascade is data. It comes from logSNR thresholds (`Cascade.from_thresholds`), from an explicit list
(`Cascade.from_steps`) or from a name (`rmd.presets.preset`), and is stored in a checkpoint's `cascade.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from rmd.fields import check_cascade, field_of, integer, number, read_cascade_fields
from rmd.size import Size
from rmd.timesteps import assign_stages, map_timestep, uniform_teacher_timesteps

if TYPE_CHECKING:  # schedules of steps are data; only noise schedules need torch
    from rmd.noise_schedule import NoiseSchedule

INTERVAL_CLIP = (0.02, 0.98)
_NARROWEST_INTERVAL = 0.02


@dataclass(frozen=True)
class Step:
    """One denoising step.

    Attributes:
        stage: index of the stage it belongs to.
        timestep: 0 to 1000, mapped to the step's side (Eq. 2): the time the network and the schedule use here. Some
            public students stand between whole timesteps (937.5); whole ones are kept as integers.
        teacher_timestep: the same step on the teacher's axis, before the map.
        size: of the picture or film at this step.
    """

    stage: int
    timestep: float
    teacher_timestep: float
    size: Size

    def __post_init__(self) -> None:
        for name in ("timestep", "teacher_timestep"):
            value = getattr(self, name)
            if isinstance(value, float) and value.is_integer():
                object.__setattr__(self, name, int(value))

    @property
    def t(self) -> float:
        """`timestep / 1000`."""
        return self.timestep / 1000

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "") -> Step:
        """Read one entry of a stored cascade's "steps"; `where` is put before the field's name in errors.

        Raises:
            ValueError: a field is missing or has a wrong value.
        """
        return cls(
            stage=field_of(data, "stage", integer, where),
            timestep=field_of(data, "timestep", number, where),
            teacher_timestep=field_of(data, "teacher_timestep", number, where),
            size=field_of(data, "size", Size.parse, where),
        )


@dataclass(frozen=True)
class Stage:
    """A maximal run of consecutive steps at one size.

    Attributes:
        teacher_interval: (low, high) in [0.02, 0.98]: where on the teacher's axis this stage is matched.
    """

    index: int
    size: Size
    steps: tuple[Step, ...]
    teacher_interval: tuple[float, float]


@dataclass(frozen=True)
class Cascade:
    """A few-step, multi-resolution sampling schedule.

    Attributes:
        name: of the preset or backbone it was made for.
        schedule_name: steps per stage, such as "2+2"; "0+4" has a single stage at the full size.
        steps: in the order they run; teacher timesteps decrease strictly.
        full_size: the teacher's size, `R` of Eq. 2; the last step runs at it.
        resolution_map: "shift", "logsnr", "none" or "inverse" (see `rmd.timesteps.map_timestep`).
        flow_shift: the teacher's own shift, already in the timesteps.
        transition_noise_intensity: `a` of Eq. 10 at a change of size, in [0, 1].
        score_noise_intensity: `a` in the noised sample that teacher and fake score see in training.
        training_noise_intensity: `transition_noise_intensity` of training roll-outs.
        step_noise_intensity: `a` inside a stage: 1 is deterministic (Euler, DDIM), 0 is fresh noise (LCM, DMD2). One
            number, or one a transition (`num_steps - 1` of them, as ancestral and TCD sampling need: see
            `rmd.noise_rules`); at a change of size `transition_noise_intensity` holds instead.
        training_step_noise_intensity: `step_noise_intensity` of training roll-outs; None: the same.
        noise_upsampling: "bilinear", "renormalised" or "nearest_block" (see `rmd.upsampling.upsample_noise`).
        x0_upsampling: "bilinear" or "bicubic": how the prediction itself is enlarged (see `rmd.upsampling.upsample`).
        initial_noise_scale: standard deviation of the noise that sampling starts from.
        final_timestep: where the last step leads to, deterministically; None is the prediction `x0_hat` itself. At 0 a
            variance preserving table still holds noise (entry 0), and TCD and some DDIM settings stop there.
        guidance_scale: used at inference; 1 means none.
        thresholds: the logSNR thresholds it was cut by, or None for an explicit list.
        stage_boundaries: teacher times in (0, 1) between the stages, decreasing; None stands for the first teacher
            time of each next stage.
        note: what whoever uses it has to know, such as that the weights were not distilled for it; said wherever the
            schedule is named.

    Raises:
        ValueError: a field has an impossible value; the message names the field.
    """

    name: str
    schedule_name: str
    steps: tuple[Step, ...]
    full_size: Size
    resolution_map: str = "shift"
    flow_shift: float = 1.0
    transition_noise_intensity: float = 1.0
    step_noise_intensity: float | tuple[float, ...] = 1.0
    noise_upsampling: str = "bilinear"
    x0_upsampling: str = "bilinear"
    initial_noise_scale: float = 1.0
    final_timestep: float | None = None
    score_noise_intensity: float = 0.2
    training_noise_intensity: float = 0.2
    training_step_noise_intensity: float | None = None
    guidance_scale: float = 1.0
    thresholds: tuple[float, ...] | None = None
    stage_boundaries: tuple[float, ...] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.step_noise_intensity, list):
            object.__setattr__(self, "step_noise_intensity", tuple(self.step_noise_intensity))
        check_cascade(self)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in order, each with its interval on the teacher's axis. The intervals are disjoint."""
        runs = [tuple(run) for _, run in groupby(self.steps, key=lambda step: step.stage)]
        boundaries = self.stage_boundaries
        if boundaries is None:
            boundaries = tuple(run[0].teacher_timestep / 1000 for run in runs[1:])
        edges = [min(max(edge, INTERVAL_CLIP[0]), INTERVAL_CLIP[1]) for edge in (1.0, *boundaries, 0.0)]
        return tuple(Stage(index, run[0].size, run, (edges[index + 1], edges[index])) for index, run in enumerate(runs))

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The distinct sizes, ascending."""
        return tuple(sorted({step.size for step in self.steps}))

    @property
    def num_steps(self) -> int:
        """How many times the network runs (on twice the batch under guidance)."""
        return len(self.steps)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` reads it back."""
        data = asdict(self)
        data["full_size"] = str(self.full_size)
        data["steps"] = [
            {
                "stage": step.stage,
                "timestep": step.timestep,
                "teacher_timestep": step.teacher_timestep,
                "size": str(step.size),
            }
            for step in self.steps
        ]
        for key in ("thresholds", "stage_boundaries", "step_noise_intensity"):
            value = data[key]
            data[key] = list(value) if isinstance(value, tuple) else value
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cascade:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: a field is missing, unknown or has a wrong value; the message names it.
        """
        return cls(**read_cascade_fields(data, [field.name for field in fields(cls)], Step.from_dict))

    @classmethod
    def from_steps(
        cls,
        name: str,
        teacher_timesteps: Sequence[float],
        sizes: Sequence[Size],
        *,
        full_size: Size | None = None,
        schedule: NoiseSchedule | None = None,
        schedule_name: str | None = None,
        **options: Any,
    ) -> Cascade:
        """A cascade from an explicit list of teacher timesteps and sizes, one of each a step.

        Args:
            full_size: `R` of Eq. 2; the last step's size when left out.
            schedule: needed for `resolution_map="logsnr"` only.
            options: further fields of `Cascade`.

        Raises:
            ValueError: lists of different lengths, or an impossible field.
        """
        if len(teacher_timesteps) != len(sizes) or not sizes:
            raise ValueError(f"{len(teacher_timesteps)} timesteps and {len(sizes)} sizes: give one size for each step")
        full = full_size or sizes[-1]
        resolution_map = options.setdefault("resolution_map", "shift")
        steps: list[Step] = []
        for timestep, size in zip(teacher_timesteps, sizes, strict=True):
            stage = 0 if not steps else steps[-1].stage + (size != steps[-1].size)
            mapped = map_timestep(timestep, full.short_side / size.short_side, resolution_map, schedule)
            steps.append(Step(stage, mapped, timestep, size))
        return cls(
            name=name,
            schedule_name=schedule_name or _split_name(steps),
            steps=tuple(steps),
            full_size=full,
            **options,
        )

    @classmethod
    def from_thresholds(
        cls,
        name: str,
        schedule: NoiseSchedule,
        sizes: Sequence[Size],
        teacher_timesteps: Sequence[int],
        thresholds: Sequence[float],
        **options: Any,
    ) -> Cascade:
        """A cascade cut by logSNR thresholds: one size for each stage, ascending, one threshold between two stages.

        A step belongs to a lower stage while the backbone's own logSNR at its teacher timestep is below the
        threshold. Stage boundaries on the teacher's axis are the thresholds' own times (Eq. 1). Where such a time
        leaves the stage above it hardly any interval (on SDXL, -6 lies beyond the table's end), the boundary is the
        next stage's first teacher time instead.

        Raises:
            ValueError: the counts do not fit, or a stage has no step.
        """
        if len(sizes) != len(thresholds) + 1:
            raise ValueError(
                f"{len(thresholds)} thresholds make {len(thresholds) + 1} stages, but there are {len(sizes)} sizes"
            )
        stages = assign_stages(schedule, teacher_timesteps, thresholds)
        boundaries: list[float] = []
        upper = INTERVAL_CLIP[1]
        for index, tau in enumerate(thresholds):
            boundary = schedule.time_from_log_snr(float(tau))
            if upper - boundary < _NARROWEST_INTERVAL:
                boundary = teacher_timesteps[stages.index(index + 1)] / 1000
            boundaries.append(boundary)
            upper = boundary
        return cls.from_steps(
            name,
            teacher_timesteps,
            [sizes[stage] for stage in stages],
            full_size=sizes[-1],
            schedule=schedule,
            thresholds=tuple(float(tau) for tau in thresholds),
            stage_boundaries=tuple(boundaries),
            **options,
        )


def _split_name(steps: Sequence[Step]) -> str:
    counts = [len(list(run)) for _, run in groupby(steps, key=lambda step: step.stage)]
    return f"0+{counts[0]}" if len(counts) == 1 else "+".join(map(str, counts))


class TeacherDefaults(Protocol):
    """What `teacher_cascade` asks of a backbone. Every backbone has these."""

    @property
    def name(self) -> str: ...
    @property
    def teacher_steps(self) -> int: ...
    @property
    def teacher_guidance(self) -> float: ...
    @property
    def flow_shift(self) -> float: ...
    @property
    def sizes(self) -> Sequence[Size]: ...


def teacher_cascade(backbone_defaults: TeacherDefaults, steps: int | None = None) -> Cascade:
    """The teacher's own sampling: one stage at the backbone's largest size, uniform steps under its flow shift, guided.

    Args:
        backbone_defaults: a backbone, or anything with its defaults.
        steps: the backbone's own number when left out.

    Raises:
        ValueError: more steps than whole timesteps can hold.
    """
    num_steps = backbone_defaults.teacher_steps if steps is None else steps
    timesteps = uniform_teacher_timesteps(num_steps, backbone_defaults.flow_shift)
    return Cascade.from_steps(
        f"{backbone_defaults.name}-teacher",
        timesteps,
        [max(backbone_defaults.sizes)] * num_steps,
        flow_shift=backbone_defaults.flow_shift,
        guidance_scale=backbone_defaults.teacher_guidance,
        score_noise_intensity=0.0,
    )
