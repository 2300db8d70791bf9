"""One server's state and its verbs: start, admit, cancel, drain, and the snapshot behind the gauges."""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from statistics import fmean

from server.core.admission import Admission
from server.core.card import ModelCard, step_costs, text_cost
from server.core.costs import CostTable
from server.core.faults import Fault, RequestError
from server.core.promises import in_a_while
from server.core.work import Work
from server.films.database import Database
from server.films.replies import ReplyStore
from server.films.runner import JobRunner
from server.front.auth import KeyRing
from server.front.builder import EngineBuilder
from server.front.engine import EngineProcess
from server.front.files import LinkedPictures
from server.front.fleet import Fleet
from server.front.generation import Event, FinishedPicture, Generation, GenerationSpec
from server.front.idempotency import IdempotencyStore
from server.front.member import WatchLimits
from server.front.members import Starts
from server.front.quotas import Quotas
from server.front.snapshot import take_snapshot
from server.objects.place import read_place
from server.objects.store import Objects
from server.start.settings import ServerSettings
from server.telemetry import open_tracing
from server.telemetry.machine import MachineCollector
from server.telemetry.metrics import Metrics, Snapshot

log = logging.getLogger("rmd.server")

READY_TEXT = "ready"
_SPEEDUP_WINDOW = 100
LAST_BATCH_SECONDS = 5.0
"""What a stop waits for the batches that run: films in them go back in line, pictures are reported failed."""


class State(Enum):
    """Where the server is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True)
class Progress:
    """How far the start-up is: ``done`` of ``total`` parts, and what is going on."""

    done: int = 0
    total: int = 1
    text: str = "starting"


JobsOpener = Callable[["Service", Sequence[ModelCard]], JobRunner]


class Service:
    """Ties settings, queue, engines, metrics and stores together; one a process.

    Args:
        settings: see :class:`ServerSettings`.
        open_jobs: opens the video jobs of the models that make films.
        starts: by device, what starts an engine on it; default: a process for each of the settings' devices; none
            where engines are enlisted (see :meth:`Fleet.enlist`).
        on_failed: told why, where no engine can be had.
        on_progress: told how far the start is.

    Raises:
        ValueError: its database or its store of objects cannot be used; the message says which, and why.
    """

    def __init__(
        self,
        settings: ServerSettings,
        open_jobs: JobsOpener,
        starts: Starts | None = None,
        on_failed: Callable[[str], None] = lambda reason: None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.settings = settings
        self.keys = KeyRing(settings.api_keys)
        self.quotas = Quotas(settings.key_rate, settings.key_requests)
        self.objects = Objects(read_place(settings.objects or str(settings.videos)))
        self.pictures = LinkedPictures(self.objects, int(settings.files_megabytes * 1e6), settings.files_seconds)
        self.database = Database(settings.video_database_url)
        most = int(settings.idempotency_megabytes * 1e6)
        bounds = settings.idempotency_replies, most, settings.idempotency_seconds
        self.replies = IdempotencyStore(ReplyStore(self.database, *bounds), *bounds)
        self.tracing = open_tracing() if settings.tracing else None
        self.metrics = Metrics(self.snapshot)
        self.metrics.registry.register(
            MachineCollector({"engines": settings.engines, "videos": settings.videos}, self._backends)
        )
        self.admission = Admission(settings.queue_items, int(settings.queue_megapixels * 1e6), share=settings.share)
        self.progress = Progress()
        self.failure: str | None = None
        self._loaded = False
        self._draining = False
        self._open_jobs = open_jobs
        self._notify_failed = on_failed
        self._notify_progress = on_progress
        self._jobs: JobRunner | None = None
        self._recent: dict[tuple[str, str], deque[float]] = {}  # by model and schedule
        self._recent_lock = threading.Lock()
        self.builder = EngineBuilder(settings, on_built=lambda: self.fleet.adopt())
        self.fleet = Fleet(
            engine_starts(settings, EngineProcess) if starts is None else starts,
            self.metrics,
            package_threads=settings.package_threads,
            limits=WatchLimits(settings.watchdog_seconds, settings.watchdog_factor),
            on_progress=lambda done, total, text: self._report(Progress(done, total, text)),
            on_ready=self._ready,
            on_failed=self._failed,
            on_picture=self._picture_done,
        )

    # -- life ------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The present state."""
        if self.failure is not None:
            return State.FAILED
        if self._draining:
            return State.DRAINING
        return State.READY if self._loaded else State.LOADING

    @property
    def alive(self) -> bool:
        """False once no engine is left or will come: nothing can be drawn any more."""
        return self.fleet.alive

    @property
    def ready(self) -> bool:
        """Whether requests are taken, and an engine works on them."""
        recorded = self.database.fault is None and (self._jobs is None or self._jobs.alive)
        return self.state is State.READY and self.alive and self.fleet.ready and recorded

    def start(self) -> None:
        """Start the engines; :attr:`state` turns READY when the first one is warm."""
        try:
            self.objects.check()
        except ValueError as error:  # before minutes of loading
            self._failed(str(error))
            return
        self.pictures.start()
        self.database.start()
        self.fleet.start()

    def drain(self) -> None:
        """Refuse new requests from now on; accepted ones are finished."""
        self._draining = True

    def wait_idle(self, timeout: float) -> bool:
        """Block until no request is left or ``timeout`` seconds passed; True where none is left."""
        return self.admission.wait_idle(timeout)

    def stop(self) -> None:
        """Stop the engines; video jobs that they had to leave unfinished go back in line."""
        self._draining = True
        self.builder.stop()
        self.fleet.stop(LAST_BATCH_SECONDS)
        self.pictures.stop()
        if self._jobs is not None:
            self._jobs.stop()
        if self.tracing is not None:
            self.tracing.close()
        self.database.close()

    # -- requests --------------------------------------------------------------------------------------------------

    @property
    def cards(self) -> tuple[ModelCard, ...]:
        """What is served, whatever the drain state; at least one.

        Raises:
            RequestError: 503 while it is loading, or where loading failed.
        """
        if not self._loaded:
            what = "could not load its model" if self.failure else f"is still loading ({self.progress.text})"
            raise RequestError(Fault.NOT_READY, f"The server {what}; see /health/ready.", retry_after=in_a_while(5))
        return tuple(self.fleet.cards.values())

    def card(self, place: str) -> ModelCard:
        """One of them, by its place.

        Raises:
            RequestError: 503 as for :attr:`cards`.
        """
        return next(card for card in self.cards if card.place == place)

    @property
    def missing(self) -> Mapping[str, str]:
        """Why each checkpoint that no engine could load could not, by model id."""
        served = {card.model_id for card in self.fleet.cards.values()}
        reasons = {name: why for member in self.fleet.members for name, why in member.missing.items()}
        return {name: why for name, why in reasons.items() if name not in served}

    @property
    def costs(self) -> CostTable:
        """What batches cost now."""
        return self.fleet.members.costs

    def check_accepting(self) -> None:
        """Raise 503 where the server is not taking requests."""
        if self.state is State.DRAINING:
            text = "The server is finishing its last requests before it stops."
            raise RequestError(Fault.DRAINING, text, retry_after=in_a_while(5))
        if self.state is not State.READY or not self.alive:
            _ = self.cards
            raise RequestError(
                Fault.NOT_READY, "The server has no engine left; see /health/ready.", retry_after=in_a_while(5)
            )

    @property
    def jobs(self) -> JobRunner:
        """The video jobs.

        Raises:
            RequestError: 503 while the models are loading, 404 where none makes films.
        """
        cards = self.cards
        if self._jobs is None:
            raise RequestError(
                Fault.NOT_FOUND,
                f"The model '{cards[0].model_id}' makes pictures, not films; use /v1/images/generations.",
                code="model_makes_pictures",
            )
        return self._jobs

    def submit(
        self, spec: GenerationSpec, sink: Callable[[Event], None], request_id: str = "", account: str = ""
    ) -> Generation:
        """Admit one request and hand it to an engine; its events go to ``sink`` from other threads.

        Raises:
            RequestError: 503 where not accepting, 429 where the queue is full.
        """
        self.check_accepting()
        costs = self._costs(spec, "seconds")
        count, pixels = len(spec.seeds), 0
        if not spec.film:  # films are bounded by videos_together, and wait as long as it takes
            pixels = count * spec.cascade.full_size.pixels
            self.check_possible(spec)
            self._check_backlog(spec, pixels, costs)
        permit = self.admission.acquire(count, pixels, account)
        try:
            now = time.monotonic()
            work = Work(
                id=request_id or uuid.uuid4().hex,
                prompt=spec.prompt,
                schedule=spec.schedule,
                seeds=spec.seeds,
                model=spec.model,
                negative_prompt=spec.negative_prompt,
                guidance_scale=spec.guidance_scale,
                noise_intensity=spec.noise_intensity,
                partial_images=spec.partial_images,
                frames_per_second=spec.frames_per_second,
                account=account,
                arrived=now,
                deadline=math.inf if spec.film else now + self.settings.deadline_seconds,
            )
            generation = Generation(spec, work, permit, sink, costs)
            generation.follow(self.card(spec.model).model_id, self.tracing)
            self.fleet.submit(generation)
        except BaseException:
            permit.release()
            raise
        return generation

    def check_possible(self, spec: GenerationSpec) -> None:
        """Refuse what could not be ready in time in an empty house, by what batches cost when their stations opened.

        Raises:
            RequestError: 400.
        """
        limit = self.settings.video_deadline_seconds if spec.film else self.settings.deadline_seconds
        count = len(spec.seeds)
        work = text_cost(self.costs, model=spec.model, how="first") + count * self._costs(spec, "first")[0]
        if work > limit:
            what = "a film" if spec.film else f"{count} picture(s)"
            raise RequestError(
                Fault.BAD_FIELD,
                f"Work on {what} of schedule '{spec.schedule}' takes {work:.0f} s here, and may take {limit:g} s; "
                "ask for less, or for another schedule.",
                param="n" if count > 1 else "schedule",
                code="takes_too_long",
            )

    def _costs(self, spec: GenerationSpec, how: str) -> tuple[float, ...]:
        told = {"model": spec.model, "how": how}
        return step_costs(self.costs, spec.cascade, spec.lane, partial_images=spec.partial_images, **told)

    def _check_backlog(self, spec: GenerationSpec, pixels: int, alone: tuple[float, ...]) -> None:
        """Refuse a request that would not be ready in time behind those that are here.

        Args:
            pixels: of its pictures in all.
            alone: one picture's work (seconds) in batches of its own, from each step on.

        Raises:
            RequestError: 429, with the seconds that are lacking.
        """
        count, shared = len(spec.seeds), self._costs(spec, "shared")[0]
        before = self.fleet.placing.backlog(alone, spec.cascade) * shared / max(alone[0], 1e-9)
        text = text_cost(self.costs, model=spec.model, how="shared")
        late = before + text + count * shared - self.settings.deadline_seconds
        if late > 0 and before > 0:  # in an empty house even what looks too slow is tried: costs are learnt from it
            raise RequestError(
                Fault.QUEUE_FULL,
                f"The queue is full: this would not be ready within {self.settings.deadline_seconds:g} s; "
                "try again after the seconds in Retry-After.",
                retry_after=self.admission.retry_after(count, pixels, late),
            )

    def cancel(self, generation: Generation, error: RequestError) -> None:
        """End a request early. Does nothing where it has ended already."""
        self.fleet.cancel(generation, error)

    # -- state for others ------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the state that the gauges show."""
        return take_snapshot(self)

    def _backends(self) -> dict[str, str]:
        return {card.model_id: card.executor_kind for card in self.fleet.cards.values()}

    @property
    def film_jobs(self) -> JobRunner | None:
        """The video jobs; None while loading, and where no model makes films."""
        return self._jobs

    def recent_compute(self) -> dict[tuple[str, str], float]:
        """Return the mean compute seconds of the last pictures, by model's place and schedule."""
        with self._recent_lock:
            return {place: fmean(window) for place, window in self._recent.items()}

    # -- called by the fleet (its lock held) -----------------------------------------------------------------------

    def _report(self, progress: Progress) -> None:
        self.progress = progress
        self._notify_progress(progress)

    def _ready(self, cards: Sequence[ModelCard]) -> None:
        self.builder.look(cards)
        if self._loaded or not (self.fleet.ready and self.alive):  # an engine that was started again, or one of several
            return
        cards = tuple(self.fleet.cards.values())
        first = cards[0].schedules[cards[0].default]
        costs = step_costs(self.costs, first.cascade, first.lane, model=cards[0].place)
        self.admission.expect(self.fleet.placing.share(costs, first.cascade))
        films = [card for card in cards if card.films]
        if films:
            try:
                self._jobs = self._open_jobs(self, films)
            except (ValueError, OSError) as error:
                self._failed(f"{type(error).__name__}: {error}")
                return
        self.progress = Progress(self.progress.total, self.progress.total, READY_TEXT)
        self._loaded = True
        if self._jobs is not None:
            self._jobs.start()  # only now are its films taken
        self._notify_progress(self.progress)
        log.info("ready: %s", ", ".join(f"{card.model_id} on {card.executor_kind}" for card in cards))

    def _failed(self, reason: str) -> None:
        if not self._draining:
            self.failure = reason
            self._notify_failed(reason)

    def _picture_done(self, generation: Generation, picture: FinishedPicture) -> None:
        with self._recent_lock:
            place = (generation.spec.model, generation.spec.schedule)
            window = self._recent.setdefault(place, deque(maxlen=_SPEEDUP_WINDOW))
            window.append(picture.record.compute)


def engine_starts(settings: ServerSettings, kind: type[EngineProcess]) -> Starts:
    """Return what starts a process for each of the settings' devices."""
    engines = zip(settings.engine_devices, settings.engine_stages, strict=True)
    return [(device, partial(kind, settings, device, stages)) for device, stages in engines]
