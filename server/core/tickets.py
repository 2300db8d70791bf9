"""A request inside an engine, its pictures, and the tickets that stand in the queues."""

from __future__ import annotations

import abc
from enum import Enum
from typing import Any

from rmd.cascade import Cascade
from rmd.size import Size
from server.core.card import partial_steps
from server.core.messages import HandedOver
from server.core.stages import Stage, Stages, stage_at, station_at
from server.core.stations import StationKey
from server.core.work import PictureRecord, PictureState, Work


class State(Enum):
    """Where a ticket is."""

    WAITING = "waiting"
    RUNNING = "running"
    LEFT = "left"
    """Made, or given up."""


class Request:
    """One unit of work on its way through an engine.

    Args:
        work: what to make.
        cascade, lane: its schedule's, with what the request changes of it.
        costs: ``costs[k]`` is the expected seconds from the start of step k to the finished picture; one entry
            more than there are steps (the last: decoding alone).

    Attributes:
        conditioning, unconditional: the encoded texts, as the device keeps them; None before the encode station.
        over: it has ended early, or is complete.
        guests: partial pictures that came from other engines, to be decoded here.
    """

    def __init__(self, work: Work, cascade: Cascade, lane: str, costs: tuple[float, ...]) -> None:
        self.work, self.cascade, self.lane, self.costs = work, cascade, lane, costs
        self.conditioning: Any = None
        self.unconditional: Any = None
        self.text_tokens = self.cut_tokens = 0
        self.over = False
        self.shown = partial_steps(cascade, work.partial_images)
        self.guests: set[Preview] = set()
        self.pictures = [Picture(self, i, seed) for i, seed in enumerate(work.seeds) if i not in work.done]

    def take(self, work: Work) -> list[Picture]:
        """Return the pictures that are asked for beside those which are here already."""
        self.work, here = work, {picture.index for picture in self.pictures}
        more = [Picture(self, i, seed) for i, seed in enumerate(work.seeds) if i not in {*work.done, *here}]
        self.pictures += more
        return more

    def take_up(self, state: PictureState, data: Any) -> Ticket | None:
        """Return what another engine handed over, to be gone on with; None where it is here already."""
        picture = Picture(self, state.index, self.work.seeds[state.index])
        picture.step, picture.stepped, picture.record = state.step, state.stepped, state.record
        if state.number >= 0 and state.size is not None:
            picture.step = self.cascade.num_steps  # it only needs decoding, and its picture is not here
            preview = Preview(picture, data, state.size, state.number)
            self.guests.add(preview)
            return preview
        if any(here.index == state.index for here in self.pictures):
            return None
        picture.data = data
        self.pictures.append(picture)
        return picture

    @property
    def complete(self) -> bool:
        """Whether nothing of it is left to do here."""
        return not self.guests and all(picture.state is State.LEFT for picture in self.pictures)

    @property
    def guided(self) -> bool:
        """True where each picture needs an unconditional row beside its own."""
        return self.cascade.guidance_scale != 1.0


class Ticket(abc.ABC):
    """What stands in queues: a picture, or a preview of one.

    Attributes:
        rows: what it takes of a batch's width at its station.
        joined: when it joined its present queue.
        data: what the device keeps of it between two stations, such as latents.
    """

    rows = 1

    def __init__(self, request: Request) -> None:
        self.request = request
        self.state = State.WAITING
        self.joined = request.work.arrived
        self.data: Any = None

    @property
    @abc.abstractmethod
    def remaining_seconds(self) -> float:
        """Expected work until this ticket leaves, queues left out."""

    @abc.abstractmethod
    def station(self) -> StationKey:
        """Where it stands next."""


class Picture(Ticket):
    """One picture or film.

    Attributes:
        step: its next denoising step.
        stepped: its share of the batches of those done.
        elsewhere: stages that are not to be done here, see :class:`server.core.messages.Submit`.
    """

    def __init__(self, request: Request, index: int, seed: int) -> None:
        super().__init__(request)
        self.index, self.seed, self.step = index, seed, 0
        self.record = PictureRecord()
        self.stepped = 0.0
        self.elsewhere: Stages = frozenset()

    @property
    def rows(self) -> int:  # type: ignore[override]
        """Rows of its station's batch: two where guidance needs a second one."""
        denoising = self.request.conditioning is not None and self.step < self.request.cascade.num_steps
        return 2 if denoising and self.request.guided else 1

    @property
    def remaining_seconds(self) -> float:
        """Expected seconds from this picture's next step to its end."""
        return self.request.costs[min(self.step, len(self.request.costs) - 1)]

    @property
    def preview_due(self) -> bool:
        """Whether the result of its next step is to be shown."""
        return self.step in self.request.shown

    def station(self) -> StationKey:
        """Encode before its text is known, then its next step's size, and decode after the last one."""
        request = self.request
        if request.conditioning is None and self.stage != "decode":
            return StationKey("encode", model=request.work.model)
        return station_at(request.cascade, request.lane, request.work.model, self.step)

    @property
    def stage(self) -> Stage:
        """Which engines can go on with it."""
        return stage_at(self.request.cascade, self.step)

    def handed_over(
        self, data: tuple[tuple[int, ...], bytes], fingerprint: str, number: int = -1, size: Size | None = None
    ) -> HandedOver:
        """Return what another engine needs to go on with it, or with a step's result that is to be shown."""
        shape, latents = data
        state = PictureState(
            index=self.index,
            step=self.step,
            shape=shape,
            latents=latents,
            record=self.record,
            stepped=self.stepped,
            number=number,
            size=size,
            fingerprint=fingerprint,
        )
        return HandedOver(self.request.work.id, state)


class Preview(Ticket):
    """A step's x0 prediction on its way to becoming a partial picture."""

    def __init__(self, picture: Picture, data: Any, size: Size, number: int) -> None:
        super().__init__(picture.request)
        self.picture, self.size, self.number = picture, size, number
        self.data = data

    @property
    def remaining_seconds(self) -> float:
        """Its picture's work: a preview goes before its own picture and nobody else's."""
        return self.picture.remaining_seconds

    def station(self) -> StationKey:
        """It only needs decoding."""
        return StationKey("decode", size=self.size, model=self.request.work.model)
