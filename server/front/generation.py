"""A request on the front: what was asked for, who hears of it, and where its pictures are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import Histogram

from rmd.cascade import Cascade
from rmd.size import Size
from server.core.admission import Permit
from server.core.faults import RequestError
from server.core.stages import ALL, Stages, costs_in, station_at
from server.core.stations import StationKey
from server.core.work import PictureRecord, PictureState, Work
from server.front.media import OutputFormat
from server.telemetry.facts import CURRENT, RequestFacts

if TYPE_CHECKING:
    from server.telemetry.tracing import RequestTrace, Tracing


@dataclass(frozen=True)
class GenerationSpec:
    """What was asked for, validated.

    Attributes:
        seeds: one a picture.
        model: whose schedule, see :attr:`ModelCard.place`.
    """

    prompt: str
    schedule: str
    cascade: Cascade
    lane: str
    seeds: tuple[int, ...]
    model: str = ""
    negative_prompt: str = ""
    guidance_scale: float | None = None
    noise_intensity: float | None = None
    partial_images: int = 0
    output_format: OutputFormat = "png"
    output_compression: int | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    base64: bool = True
    """Whether the reply holds the pictures themselves, in base64."""
    frames_per_second: int | None = None
    """Of a film, whose progress is reported; None for pictures."""
    carrier: tuple[tuple[str, str], ...] = ()
    """Of a film, whose own request has been answered: the headers by which its trace goes on."""

    @property
    def film(self) -> bool:
        """True where a film is asked for."""
        return self.frames_per_second is not None

    @property
    def label(self) -> str:
        """The schedule as metrics name it: another model's than the first has its id in front."""
        return of_model(self.model, self.schedule)


def of_model(place: str, name: str) -> str:
    """Return what metrics call something of a model."""
    return f"{place} {name}" if place else name


@dataclass(frozen=True)
class PartialPicture:
    """Event: a step's result, decoded."""

    index: int
    partial_index: int
    size: Size
    content: bytes
    encoded: str = ""


@dataclass(frozen=True)
class FinishedPicture:
    """Event: one picture, or film, is complete. Films come with two pictures of themselves.

    ``encoded`` is the content in base64, where the reply holds it.
    """

    index: int
    content: bytes
    record: PictureRecord
    encoded: str = ""
    thumbnail: bytes = b""
    spritesheet: bytes = b""


@dataclass(frozen=True)
class Advanced:
    """Event, of films only: the first step begins (share 0), or a step is done.

    ``share`` of the expected work behind the film, text left out.
    """

    share: float


@dataclass(frozen=True)
class Failed:
    """Event: the generation ended without its pictures; nothing follows."""

    error: RequestError


Event = PartialPicture | FinishedPicture | Advanced | Failed


@dataclass
class Place:
    """Where one picture is, as far as the front has heard.

    Attributes:
        station: it waits at, or runs at; None once its pixels are on their way.
        engine: which has it; None where none has.
        state: from the last hand-over, with which it goes on should its engine be lost; None where it begins anew.
        decoded: its pixels are here.
        left: it is finished or given up, and its place in the queue given back.
    """

    station: StationKey | None
    step: int = 0
    running: bool = False
    decoded: bool = False
    left: bool = False
    engine: int | None = None
    state: PictureState | None = None


class Generation:
    """One admitted request.

    Args:
        spec: what to make.
        work: the same, as engines take it.
        permit: its pictures give their places back as they leave, one by one.
        sink: called with each event, from any thread; must not block.
        costs: ``costs[k]`` is the expected seconds from the start of step k to the finished picture.

    Attributes:
        previews: partial pictures that one engine has handed over and another one is to decode, as `shown`.
        strikes: engines that ended while a batch with it ran.
        shown: partial pictures that were sent: (picture, number).
        partial: whether its client has been sent one.
        facts: of the HTTP request that waits for it; a film's is over.
        trace: its spans, where it is traced and sampled.
        model_id: whose schedule it is.
    """

    def __init__(
        self,
        spec: GenerationSpec,
        work: Work,
        permit: Permit,
        sink: Callable[[Event], None],
        costs: tuple[float, ...],
    ) -> None:
        self.spec, self.work, self.permit, self.sink, self.costs = spec, work, permit, sink, costs
        self.text_tokens = self.cut_tokens = 0
        self.failed = False
        self.previews: dict[tuple[int, int], Place] = {}
        self._parts: dict[Stages, tuple[float, ...]] = {ALL: costs}
        self.strikes = 0
        self.shown: set[tuple[int, int]] = set()
        self.partial = False
        self.facts: RequestFacts | None = None
        self.trace: RequestTrace | None = None
        self.model_id = ""
        self.places = [self.place() for _ in spec.seeds]

    @property
    def id(self) -> str:
        """Names it everywhere."""
        return self.work.id

    @property
    def arrived(self) -> float:
        """Monotonic seconds of its admission."""
        return self.work.arrived

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.failed or all(place.left for place in self.places)

    def follow(self, model_id: str, tracing: Tracing | None) -> None:
        """Note what is asked for beside the HTTP request that waits for it, and begin its spans.

        Args:
            model_id: whose schedule.
            tracing: None where nothing is traced.
        """
        spec, self.facts, self.model_id = self.spec, CURRENT.get(), model_id
        if self.facts is not None:
            self.facts.model, self.facts.schedule = model_id, spec.schedule
        if tracing is not None:
            about = {"rmd.request_id": self.id, "rmd.model": model_id, "rmd.schedule": spec.schedule}
            parent = None if self.facts is None else self.facts.span
            self.trace = tracing.follow(parent, dict(spec.carrier), self.arrived, spec.film, spec.seeds, about)
        if self.facts is not None:
            self.facts.trace = self.trace

    def took(self, histogram: Histogram, seconds: float) -> None:
        """Observe a time of it, by model and schedule, with its trace as the exemplar."""
        exemplar = None if self.facts is None else self.facts.exemplar
        histogram.labels(self.model_id, self.spec.label).observe(seconds, exemplar)

    def seconds_left(self) -> float:
        """Seconds until its deadline; negative once it has passed."""
        return self.work.deadline - time.monotonic()

    def place(self, state: PictureState | None = None) -> Place:
        """Return where a picture is that no engine has: at its beginning, or as it was handed over."""
        spec = self.spec
        if state is None:
            return Place(StationKey("encode", model=spec.model))
        return Place(station_at(spec.cascade, spec.lane, spec.model, state.step), state.step, state=state)

    def remaining(self, place: Place, stages: Stages = ALL) -> float:
        """Expected work on one of its pictures, at some stages alone."""
        if place.decoded or place.left:
            return 0.0
        if stages not in self._parts:
            self._parts[stages] = costs_in(self.costs, self.spec.cascade, stages)
        return self._parts[stages][min(place.step, len(self.costs) - 1)]
