"""One server's state and its verbs: load, admit, cancel, drain, and the snapshot behind the gauges."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from server.core.admission import LONGEST_RETRY, Admission
from server.core.request import Event, Generation, GenerationSpec, Item
from server.device.executor import DeviceExecutor
from server.device.model import ServedModel
from server.films.runner import FilmMaker, JobLimits, JobRunner
from server.films.shelf import FilmShelf
from server.films.store import JobStore
from server.http.auth import KeyRing
from server.http.errors import ApiError, Fault
from server.http.files import FileStore
from server.http.idempotency import IdempotencyStore
from server.http.replies import report
from server.http.resolve import resolve_film
from server.http.schemas import VideoRequest
from server.start.settings import ServerSettings
from server.telemetry.metrics import Metrics, Snapshot

log = logging.getLogger("rmd.server")

READY_TEXT = "ready"
_SPEEDUP_WINDOW = 100
LAST_BATCH_SECONDS = 5.0
"""What a stop waits for the batch that runs: films in it go back in line, pictures are reported failed."""


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


ModelLoader = Callable[[ServerSettings, Callable[[Progress], None]], ServedModel]


class Service:
    """Ties settings, queue, executor, metrics and stores together; one a process.

    Args:
        settings: see :class:`ServerSettings`.
        loader: builds the model on the device thread and reports its progress.
        on_failed: called (on the device thread) where the model cannot be loaded.
    """

    def __init__(
        self,
        settings: ServerSettings,
        loader: ModelLoader,
        on_failed: Callable[[BaseException], None] = lambda error: None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.settings = settings
        self.keys = KeyRing(settings.api_keys)
        self.files = FileStore(int(settings.files_megabytes * 1e6), settings.files_seconds)
        self.replies = IdempotencyStore(
            settings.idempotency_replies, int(settings.idempotency_megabytes * 1e6), settings.idempotency_seconds
        )
        self.metrics = Metrics(self.snapshot)
        self.admission = Admission(settings.queue_items, int(settings.queue_megapixels * 1e6))
        self.progress = Progress()
        self.failure: str | None = None
        self._model: ServedModel | None = None
        self._draining = False
        self._notify_failed = on_failed
        self._notify_progress = on_progress
        self._jobs: JobRunner | None = None
        self._recent: dict[str, deque[float]] = {}
        self._recent_lock = threading.Lock()
        self._executor = DeviceExecutor(
            lambda: loader(settings, self._report),
            self.metrics,
            package_threads=settings.package_threads,
            film_seconds=settings.video_deadline_seconds,
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
        return State.LOADING if self._model is None else State.READY

    @property
    def alive(self) -> bool:
        """False once the device thread is gone: nothing can be drawn any more."""
        return self._executor.alive

    def start(self) -> None:
        """Start loading; :attr:`state` turns READY when the model is warm."""
        self._executor.start()

    def drain(self) -> None:
        """Refuse new requests from now on; accepted ones are finished."""
        self._draining = True

    def wait_idle(self, timeout: float) -> bool:
        """Block until no request is left or ``timeout`` seconds passed; True where none is left."""
        return self.admission.wait_idle(timeout)

    def stop(self) -> None:
        """Stop the device thread; video jobs that it had to leave unfinished go back in line."""
        self._draining = True
        self._executor.stop(LAST_BATCH_SECONDS)
        if self._jobs is not None:
            self._jobs.stop()

    # -- requests --------------------------------------------------------------------------------------------------

    @property
    def model(self) -> ServedModel:
        """The model, whatever the drain state.

        Raises:
            ApiError: 503 while it is loading, or where loading failed.
        """
        if self._model is None:
            what = "could not load its model" if self.failure else f"is still loading ({self.progress.text})"
            raise ApiError(Fault.NOT_READY, f"The server {what}; see /health/ready.", retry_after=5)
        return self._model

    def check_accepting(self) -> None:
        """Raise 503 where the server is not taking requests."""
        if self.state is State.DRAINING:
            raise ApiError(Fault.DRAINING, "The server is finishing its last requests before it stops.", retry_after=5)
        if self.state is not State.READY:
            _ = self.model
            raise ApiError(Fault.NOT_READY, "The server's device thread has ended; see /health/ready.", retry_after=5)

    @property
    def jobs(self) -> JobRunner:
        """The video jobs.

        Raises:
            ApiError: 503 while the model is loading, 404 where it makes pictures.
        """
        model = self.model
        if self._jobs is None:
            raise ApiError(
                Fault.NOT_FOUND,
                f"The model '{model.model_id}' makes pictures, not films; use /v1/images/generations.",
                code="model_makes_pictures",
            )
        return self._jobs

    def submit(self, spec: GenerationSpec, sink: Callable[[Event], None], request_id: str = "") -> Generation:
        """Admit one request and queue it; its events go to ``sink`` from other threads.

        Raises:
            ApiError: 503 where not accepting, 429 where the queue is full.
        """
        self.check_accepting()
        film = spec.frames_per_second is not None
        costs = self.model.costs(spec.cascade, spec.lane)
        if not film:
            self._check_backlog(len(spec.seeds) * costs[0], self.check_possible(spec), costs[0])
        # Films are bounded by videos_together already; their pixels are no measure of what a queue of pictures holds.
        permit = self.admission.acquire(len(spec.seeds), 0 if film else len(spec.seeds) * spec.cascade.full_size.pixels)
        try:
            # A film waits in line for as long as it takes; the executor counts its work.
            deadline = math.inf if film else time.monotonic() + self.settings.deadline_seconds
            generation = Generation(spec, permit, deadline, sink, costs, request_id)
            self._executor.submit(generation)
        except BaseException:
            permit.release()
            raise
        return generation

    def check_possible(self, spec: GenerationSpec) -> float:
        """Return the expected work (seconds) on a request in the best company.

        Raises:
            ApiError: 400 where it could not be ready in time in an empty house either.
        """
        film = spec.frames_per_second is not None
        limit = self.settings.video_deadline_seconds if film else self.settings.deadline_seconds
        count = len(spec.seeds)
        work = count * self.model.costs(spec.cascade, spec.lane, shared=True)[0]
        if work > limit:
            what = "a film" if film else f"{count} picture(s)"
            raise ApiError(
                Fault.BAD_FIELD,
                f"Work on {what} of schedule '{spec.schedule}' takes {work:.0f} s here, and may take {limit:g} s; "
                "ask for less, or for another schedule.",
                param="n" if count > 1 else "schedule",
                code="takes_too_long",
            )
        return work

    def _check_backlog(self, alone: float, shared: float, one: float) -> None:
        """Refuse a request that would not be ready in time behind those that are here.

        Args:
            alone, shared: its work (seconds) in batches of its own, and in the best company.
            one: one of its pictures' work; others that need more are passed.

        Raises:
            ApiError: 429, with the seconds that are lacking.
        """
        before = self._executor.backlog(one) * shared / alone
        late = before + shared - self.settings.deadline_seconds
        if late > 0:
            raise ApiError(
                Fault.QUEUE_FULL,
                f"The queue is full: this would not be ready within {self.settings.deadline_seconds:g} s; "
                "try again after the seconds in Retry-After.",
                retry_after=min(max(math.ceil(late), 1), LONGEST_RETRY),
            )

    def cancel(self, generation: Generation, error: ApiError) -> None:
        """End a request early. Does nothing where it has ended already."""
        self._executor.cancel(generation, error)

    # -- state for others ------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the state that the gauges show."""
        model = self._model
        with self._recent_lock:
            means = {name: sum(window) / len(window) for name, window in self._recent.items() if window}
        speedup = {
            (name, kind): ratio
            for name, mean in means.items()
            for kind, ratio in (model.speedups(mean) if model else {}).items()
        }
        return Snapshot(
            ready=self.state is State.READY,
            draining=self.state is State.DRAINING,
            load_progress=1.0 if model else self.progress.done / max(self.progress.total, 1),
            in_flight_requests=self.admission.requests,
            in_flight_items=self.admission.items,
            queue_capacity_items=self.admission.max_items,
            queue_depth=self._executor.depths(),
            batch_width={key.label: model.latencies.width(key) for key in model.stations()} if model else {},
            engine_memory_bytes=model.memory_bytes if model else {},
            teacher_seconds={baseline.kind: baseline.seconds for baseline in model.baselines} if model else {},
            speedup=speedup,
            stored_file_bytes=self.files.stored_bytes,
            video_jobs=self._jobs.counts() if self._jobs else {},
        )

    # -- called by the executor ------------------------------------------------------------------------------------

    def _report(self, progress: Progress) -> None:
        if self._draining:
            raise InterruptedError("the server was stopped while it was loading")
        self.progress = progress
        self._notify_progress(progress)

    def _ready(self, model: ServedModel) -> None:
        default = model.schedules[model.default]
        seconds_each = model.costs(default.cascade, default.lane)[0]
        self.admission.expect(seconds_each)
        if model.films:
            self._jobs = self._open_jobs(model, seconds_each)
        self.progress = Progress(self.progress.total, self.progress.total, READY_TEXT)
        self._model = model
        if self._jobs is not None:
            self._jobs.start()  # only now are its films taken
        self._notify_progress(self.progress)
        log.info("ready: %s on %s", model.model_id, model.executor_kind)

    def _open_jobs(self, model: ServedModel, seconds_per_film: float) -> JobRunner:
        settings = self.settings
        shelf = FilmShelf(settings.videos)
        return JobRunner(
            JobStore(settings.video_database_url),
            shelf,
            FilmMaker(
                prepare=lambda request: resolve_film(VideoRequest.model_validate(request), model, settings),
                submit=self.submit,
                cancel=self.cancel,
                report=lambda generation, film: report(model, generation, [film]).model_dump(),
                ended=lambda job, outcome: self.metrics.video_ended(
                    str(job.request["schedule"]), outcome, time.time() - job.created_at
                ),
            ),
            model.model_id,
            JobLimits(
                queue=settings.video_queue,
                together=settings.videos_together,
                seconds=settings.video_seconds,
                bytes=int(settings.video_gigabytes * 1e9),
            ),
            seconds_per_film,
        )

    def _failed(self, error: BaseException) -> None:
        if isinstance(error, InterruptedError):
            return
        self.failure = f"{type(error).__name__}: {error}"
        self._notify_failed(error)

    def _picture_done(self, generation: Generation, item: Item) -> None:
        with self._recent_lock:
            window = self._recent.setdefault(generation.spec.schedule, deque(maxlen=_SPEEDUP_WINDOW))
            window.append(item.record.compute)
