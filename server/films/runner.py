"""Feeds video jobs to the executor and writes down what becomes of them.

One thread. The executor's events come in through a queue, since a sink must not block on a database; between events
the thread renews leases, takes further jobs and, now and then, tidies up.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from server.core.admission import LONGEST_RETRY
from server.core.faults import COMPLETED, Fault, RequestError
from server.films.shelf import FILM, SPRITESHEET, THUMBNAIL, FilmShelf
from server.films.store import CANCELLED, JobStore, Line, VideoJob
from server.front.generation import Advanced, Event, Failed, FinishedPicture, Generation, GenerationSpec

log = logging.getLogger("rmd.server")

_LEASE_SECONDS = 30.0
_TICK_SECONDS = 5.0
_TIDY_SECONDS = 60.0
_RETRY_SECONDS = 1.0
_MOST_ENDED = 10_000
_MOST_ATTEMPTS = 3
LAST_JOBS_SECONDS = 30.0
"""The longest that a stop waits for the database."""


@dataclass(frozen=True)
class JobLimits:
    """Bounds of the jobs.

    Attributes:
        queue: jobs that may wait or be worked on at once.
        together: jobs given to the executor at once, which batches them by stage.
        seconds: how long a finished film is kept, and a job waits to be begun at most.
        bytes: of all films; the oldest leave first.
    """

    queue: int
    together: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class FilmMaker:
    """What the runner asks of the service.

    Attributes:
        prepare: from a job's stored request to a spec. Raises RequestError where the served model cannot do it.
        submit: admit a spec; its events go to the sink. Raises RequestError where it is not taken now.
        cancel: end a generation early.
        report: the ``rmd`` object of a finished film.
        ended: told of a job that ended, and of its outcome as the metrics call it.
    """

    prepare: Callable[[Mapping[str, Any]], GenerationSpec]
    submit: Callable[[GenerationSpec, Callable[[Event], None], str], Generation]
    cancel: Callable[[Generation, RequestError], None]
    report: Callable[[Generation, FinishedPicture], dict[str, Any]]
    ended: Callable[[VideoJob, str], None] = lambda job, outcome: None


class JobRunner:
    """The video jobs of one server: accepts, runs, cancels and keeps them.

    Args:
        store, shelf: where jobs and their films are kept.
        maker: what makes the films.
        models: the ids of the served models that make films.
        limits: see :class:`JobLimits`.
        seconds_per_film: expected work on one film, for Retry-After.
    """

    def __init__(
        self,
        store: JobStore,
        shelf: FilmShelf,
        maker: FilmMaker,
        models: Collection[str],
        limits: JobLimits,
        seconds_per_film: float = 1.0,
    ) -> None:
        self.store, self.shelf = store, shelf
        self._maker = maker
        self._models = models
        self._limits = limits
        self.seconds_per_film = seconds_per_film
        self._worker = uuid.uuid4().hex
        self._admitting = threading.Lock()
        self._events: queue.SimpleQueue[tuple[str, Event] | None] = queue.SimpleQueue()
        self._running: dict[str, tuple[VideoJob, Generation]] = {}  # by id; the thread's own
        self._suspect = False  # the one that runs was begun before, by a worker that ended: no company
        self._stopping = False
        self._renewed = self._tidied = 0.0
        self._thread = threading.Thread(target=self._main, name="rmd-jobs", daemon=True)

    # -- called from any thread --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take up what was left unfinished, then whatever comes."""
        self._events.put(None)  # at once, not at the first tick
        self._thread.start()

    def stop(self, timeout: float = LAST_JOBS_SECONDS) -> None:
        """Write down the last events, give back what is unfinished, and end. The executor must have stopped."""
        self._stopping = True
        self._events.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self.store.close()

    def accept(self, job: VideoJob) -> VideoJob:
        """Keep a new job; it will be finished or reported failed.

        Raises:
            RequestError: 429 where too many wait.
        """
        with self._admitting:
            waiting = self.store.count_open(self._models)
            if waiting >= self._limits.queue:
                surplus = waiting - self._limits.queue + 1
                raise RequestError(
                    Fault.QUEUE_FULL,
                    f"{waiting} films wait or are being made, and {self._limits.queue} may; "
                    "try again after the seconds in Retry-After.",
                    retry_after=min(max(math.ceil(surplus * self.seconds_per_film), 1), LONGEST_RETRY),
                )
            self.store.add(job)
        self._events.put(None)
        return job

    def remove(self, job: VideoJob) -> None:
        """Cancel an unfinished job, which then reads as failed; forget a finished one and its film."""
        now = time.time()
        if self.store.cancel(job.id, now, now + self._limits.seconds):
            self._events.put((job.id, Failed(_cancelled())))
            self._maker.ended(job, _cancelled().fault.value.outcome)
            return
        self.store.delete(job.id)
        self.shelf.remove(job.id)

    def counts(self) -> dict[str, int]:
        """Return the number of this model's jobs by status; none where the database does not answer."""
        try:
            return self.store.counts(self._models)
        except SQLAlchemyError:
            return {}

    def line(self) -> Line | None:
        """Return what waits; None where the database does not answer."""
        try:
            return self.store.line(self._models)
        except SQLAlchemyError:
            return None

    # -- the thread --------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        event: tuple[str, Event] | None = None
        while True:
            if event is None:
                with contextlib.suppress(queue.Empty):
                    event = self._events.get(timeout=_TICK_SECONDS)
            try:
                if event is not None:
                    self._heed(*event)
                    event = None
                if self._stopping and self._events.empty():
                    self._give_back()
                    return
                if not self._stopping:
                    self._renew()
                    self._tidy()
                    self._feed()
            except SQLAlchemyError as error:
                # What has not been written down is tried again: a finished film must not be lost to a locked database.
                log.error("the database of video jobs failed: %s", error)
                if self._stopping:
                    return
                time.sleep(_RETRY_SECONDS)
            except Exception:  # of one job: its lease lapses, and it is tried again a few times
                log.exception("a video job could not be handled")
                if event is not None:
                    self._running.pop(event[0], None)
                event = None

    def _feed(self) -> None:
        """Give waiting jobs to the executor while it takes them."""
        while len(self._running) < (1 if self._suspect else self._limits.together):
            now = time.time()
            job = self.store.claim(self._models, self._worker, now, now + _LEASE_SECONDS)
            if job is None:
                return
            if job.attempts >= _MOST_ATTEMPTS:
                text = f"{_MOST_ATTEMPTS} times a server stopped while it made this film."
                self._fail(job, RequestError(Fault.ENGINE_FAILED, text))
                continue
            if job.attempts and self._running:  # it may have been the cause: not in company
                self.store.release(job.id, self._worker)
                return
            try:
                spec = self._maker.prepare(job.request)
                self._running[job.id] = job, self._maker.submit(spec, self._sink(job.id), job.id)
                self._suspect = job.attempts > 0
            except RequestError as error:
                if error.fault.value.retry:  # full, draining: it stays in line
                    self.store.release(job.id, self._worker)
                    return
                self._fail(job, error)
            except Exception:  # such as a request that another version of the server wrote
                log.exception("job %s cannot be begun", job.id)
                self._fail(
                    job, RequestError(Fault.ENGINE_FAILED, "The server cannot make a film from the stored request.")
                )

    def _sink(self, job_id: str) -> Callable[[Event], None]:
        return lambda event: self._events.put((job_id, event))

    def _heed(self, job_id: str, event: Event) -> None:
        """Write down one event of a job that runs here."""
        if job_id not in self._running:
            return
        job, generation = self._running[job_id]
        if isinstance(event, Advanced):
            if not self.store.advance(job_id, self._worker, math.floor(99 * event.share)):
                self._drop(job_id)
            return
        if isinstance(event, FinishedPicture):
            self._finish(job, generation, event)
        elif isinstance(event, Failed):
            if event.error.code == CANCELLED:
                self._maker.cancel(generation, event.error)
            elif event.error.fault is Fault.DRAINING:
                self.store.release(job_id, self._worker)
            elif event.error.fault is Fault.NOT_READY:  # the device broke, perhaps by this very film
                self.store.release(job_id, self._worker, counts=True)
            else:
                self._fail(job, event.error)
        self._running.pop(job_id)

    def _finish(self, job: VideoJob, generation: Generation, film: FinishedPicture) -> None:
        now = time.time()
        files = {FILM: film.content, THUMBNAIL: film.thumbnail, SPRITESHEET: film.spritesheet}
        try:
            self.shelf.put(job.id, files)
        except OSError as error:
            log.error("the film of %s cannot be kept: %s", job.id, error)
            text = "The film was made and could not be kept: the server's disk failed."
            self._fail(job, RequestError(Fault.INTERNAL, text, code="storage_failed"))
            return
        report = self._maker.report(generation, film)
        size = sum(map(len, files.values()))
        if self.store.complete(job.id, self._worker, now, now + self._limits.seconds, size, report):
            self._maker.ended(job, COMPLETED)
            self._bound_bytes()
            return
        # No longer ours: cancelled at the last moment, or another worker's, whose files these are too.
        found = self.store.get(job.account, job.id)
        if found is None or found.status == "failed":
            self.shelf.remove(job.id)

    def _fail(self, job: VideoJob, error: RequestError) -> None:
        now = time.time()
        if self.store.fail(job.id, self._worker, now, now + self._limits.seconds, error.code, error.message):
            self._maker.ended(job, error.fault.value.outcome)

    def _drop(self, job_id: str) -> None:
        """Stop working on a job that is no longer ours."""
        self._maker.cancel(self._running.pop(job_id)[1], _cancelled())

    def _renew(self) -> None:
        now = time.time()
        if now - self._renewed < _LEASE_SECONDS / 3:
            return
        for job_id in list(self._running):
            if not self.store.renew(job_id, self._worker, now + _LEASE_SECONDS):
                self._drop(job_id)
        self._renewed = now  # only now: after a failed attempt nothing is claimed before what runs here is held again

    def _tidy(self) -> None:
        now = time.time()
        if now - self._tidied < _TIDY_SECONDS:
            return
        self._tidied = now
        self.store.give_up_waiting(now, now - self._limits.seconds, now + self._limits.seconds)
        expired = [job.id for job in self.store.with_files() if job.expires_at is not None and job.expires_at <= now]
        self.store.forget_expired(now)
        self.store.forget_surplus(_MOST_ENDED)
        for job_id in expired:
            self.shelf.remove(job_id)
        self.shelf.sweep({job.id for job in self.store.with_files()})

    def _bound_bytes(self) -> None:
        """Let the oldest films go while there are too many; the newest one stays in any case."""
        kept = self.store.with_files()
        total = sum(job.bytes for job in kept)
        for job in kept[:-1]:
            if total <= self._limits.bytes:
                return
            self.store.drop_files(job.id, time.time())
            self.shelf.remove(job.id)
            total -= job.bytes

    def _give_back(self) -> None:
        for job_id in self._running:
            self.store.release(job_id, self._worker)
        self._running.clear()


def _cancelled() -> RequestError:
    return RequestError(Fault.CLIENT_GONE, "The job was cancelled.", code=CANCELLED)
