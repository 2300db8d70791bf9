"""What an engine serves, said without its weights: schedules, sizes, tokens, the teacher's own latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from rmd.cascade import Cascade
from rmd.size import Size
from server.core.costs import CostTable
from server.core.stations import STUDENT, StationKey

TEACHER_SCHEDULE = "teacher"
EAGER = EAGER_TEACHER = "eager"
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

    def changed(self, guidance_scale: float | None, noise_intensity: float | None) -> Cascade:
        """Return the cascade with what a request changes of it; None leaves a value."""
        cascade = self.cascade
        if noise_intensity is not None:
            cascade = replace(cascade, transition_noise_intensity=noise_intensity)
        if guidance_scale is not None:
            cascade = replace(cascade, guidance_scale=guidance_scale)
        return cascade


class TeacherBaseline(msgspec.Struct, frozen=True):
    """The teacher's own latency for one picture on this machine, at batch 1.

    ``seconds = encode + steps * guided step + decode``. ``kind`` is "eager", or "compiled" for the same network
    through engines: the first says what this server gains over plain use of the teacher, the second what is left
    when the teacher is compiled too.

    Attributes:
        measured: monotonic seconds of the latest timing of a guided step.
        spread: of the timings: third quartile over first. Well above 1, the machine was not steady.
    """

    kind: str
    steps: int
    guided_step_seconds: float
    encode_seconds: float
    decode_seconds: float
    measured: float = 0.0
    spread: float = 1.0

    @property
    def seconds(self) -> float:
        """Seconds of one picture."""
        return self.encode_seconds + self.steps * self.guided_step_seconds + self.decode_seconds

    @property
    def steady(self) -> bool:
        """Whether a ratio to it means something."""
        return self.spread <= 1.5


@dataclass(frozen=True)
class ModelCard:
    """A checkpoint as its clients, the front and the scheduler need to know it.

    Attributes:
        place: tells its stations from those of other checkpoints on the same device: empty for the server's first
            checkpoint, the model's id for the others.
        tokens: picture tokens of the denoiser by size ("256x256").
        text_limit: tokens of a prompt that the text encoder hears; 0 where it has no tokenizer.
        complete: every engine that it may run through is in service.
        compiled: by station label, the batch sizes that have an engine; empty while the station runs eager.
        memory_bytes: weights by component.
        fingerprint: of its files, see :meth:`rmd.checkpoint.CheckpointFolder.fingerprint`.
    """

    model_id: str
    created: int
    media: str
    frames_per_second: int
    schedules: Mapping[str, Schedule]
    default: str
    tokens: Mapping[str, int]
    text_limit: int = 0
    executor_kind: str = "eager"
    complete: bool = True
    compiled: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    baselines: tuple[TeacherBaseline, ...] = ()
    place: str = ""
    fingerprint: str = ""

    @property
    def films(self) -> bool:
        """True where it makes films, not pictures."""
        return self.media == "video"

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The finished sizes on offer, smallest first."""
        return tuple(sorted({schedule.cascade.full_size for schedule in self.schedules.values()}))

    def stations(self) -> tuple[StationKey, ...]:
        """Return every station of the schedules on offer, in the order a picture meets them."""
        keys = {
            StationKey("denoise", schedule.lane, step.size, self.place): None
            for schedule in self.schedules.values()
            for step in schedule.cascade.steps
        }
        denoise = sorted(keys, key=lambda key: (key.lane != STUDENT, key.size))
        decode = [StationKey("decode", size=size, model=self.place) for size in self.sizes]
        return (StationKey("encode", model=self.place), *denoise, *decode)

    def preview_stations(self) -> tuple[StationKey, ...]:
        """Return the decode stations below full size, where partial pictures are made."""
        sizes = {step.size for schedule in self.schedules.values() for step in schedule.cascade.steps}
        return tuple(StationKey("decode", size=size, model=self.place) for size in sorted(sizes - set(self.sizes)))

    def joined(self, other: ModelCard) -> ModelCard:
        """Return the card of the same model whose other stages are on other engines."""
        return replace(
            self,
            complete=self.complete and other.complete,
            compiled={**other.compiled, **self.compiled},
            memory_bytes={**other.memory_bytes, **self.memory_bytes},
            executor_kind=other.executor_kind if self.executor_kind == EAGER else self.executor_kind,
            baselines=self.baselines or other.baselines,
        )

    def executor_of(self, cascade: Cascade, lane: str) -> str:
        """Return what a schedule's stations run on now: the engines' backend, "eager", or "partly" the backend."""
        keys = [StationKey("encode", model=self.place), StationKey("decode", size=cascade.full_size, model=self.place)]
        keys += [StationKey("denoise", lane, size, self.place) for size in cascade.sizes]
        through = [bool(self.compiled.get(key.label)) for key in keys]
        if all(through):
            return self.executor_kind
        return f"partly {self.executor_kind}" if any(through) else EAGER

    def speedups(self, compute_seconds: float) -> dict[str, float]:
        """Return the teacher's seconds over ``compute_seconds`` by kind, of those baselines that are steady."""
        if compute_seconds <= 0:
            return {}
        return {known.kind: known.seconds / compute_seconds for known in self.baselines if known.steady}


def step_costs(
    costs: CostTable, cascade: Cascade, lane: str, *, model: str = "", partial_images: int = 0, how: str = "seconds"
) -> tuple[float, ...]:
    """Return the expected seconds of one picture from each step to its end; the last entry is decoding.

    Args:
        model: the card's place.
        partial_images: shown on the way; each costs a decoding at its size.
        how: "seconds" alone, "shared" for its part of batches in the best company, or "first" for the same by the
            station's first timings.
    """
    rows = 1 if cascade.guidance_scale == 1.0 else 2
    seconds = _measure(costs, how)
    shown = partial_steps(cascade, partial_images)
    left = [seconds(StationKey("decode", size=cascade.full_size, model=model), 1)]
    for index in reversed(range(cascade.num_steps)):
        size = cascade.steps[index].size
        more = seconds(StationKey("denoise", lane, size, model), rows)
        if index in shown:
            more += seconds(StationKey("decode", size=size, model=model), 1)
        left.append(left[-1] + more)
    return tuple(reversed(left))


def text_cost(costs: CostTable, *, model: str = "", how: str = "seconds") -> float:
    """Return the expected seconds of a request's text, however many pictures it is for."""
    return _measure(costs, how)(StationKey("encode", model=model), 1)


def _measure(costs: CostTable, how: str) -> Callable[[StationKey, int], float]:
    return {"seconds": costs.seconds, "shared": costs.shared, "first": costs.first}[how]


def partial_steps(cascade: Cascade, wanted: int) -> tuple[int, ...]:
    """Return the steps after which a partial picture is shown, at most ``wanted``, as many as there are otherwise.

    The ends of the stages below the last one come first (a cascade's low result is a whole picture); a schedule
    of one stage shows evenly spaced steps instead. Never the last step: that is the picture itself.
    """
    last = cascade.num_steps - 1
    if wanted <= 0 or last < 1:
        return ()
    boundaries = [i for i in range(last) if cascade.steps[i + 1].size != cascade.steps[i].size]
    if boundaries:
        return tuple(boundaries[-wanted:])
    count = min(wanted, last)
    return tuple((i + 1) * last // (count + 1) for i in range(count)) if count < last else tuple(range(last))
