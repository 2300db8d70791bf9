"""Feeds video jobs to the executor and writes down what becomes of them.

One thread. The executor's events come in through a queue, since a sink must not block on a database; between events
the thread renews leases, takes further jobs and, now and then, has tidied up.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass

from server.core.faults import COMPLETED, Fault, RequestError, deadline_error
from server.core.promises import Promises
from server.films.database import DatabaseError
from server.films.maker import FilmMaker, JobLimits
from server.films.shelf import FilmShelf
from server.films.store import CANCELLED, JobStore, Line, Queue
from server.films.tables import VideoJob
from server.films.tidying import Tidying
from server.films.writer import FilmWriter, Kept
from server.front.generation import Advanced, Event, Failed, FinishedPicture, Generation
from server.front.idempotency import key_reused

log = logging.getLogger("rmd.server")

_LEASE_SECONDS = 30.0
_TICK_SECONDS = 5.0
_TIDY_SECONDS = 60.0
_RETRY_SECONDS = 1.0
_PROGRESS_SECONDS = 1.0
_ADMIT_SECONDS = 2.0  # for the requests in front, which take milliseconds each unless the database does not answer
_MOST_ENDED = 10_000
_MOST_ATTEMPTS = 3
_LAST_FILMS_SECONDS = 10.0
LAST_JOBS_SECONDS = 30.0
"""The longest that a stop waits for the database."""


@dataclass
class _Running:
    """A job that runs here.

    Attributes:
        progress: the last one that was told; ``written`` in the database, at ``written_at`` (monotonic).
    """

    job: VideoJob
    generation: Generation
    progress: int = -1
    written: int = -1
    written_at: float = -math.inf


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
        self._promises = Promises(seconds_per_film)
        self._worker = uuid.uuid4().hex
        self._admitting = threading.Lock()
        # None: there may be a new job
        self._events: queue.SimpleQueue[tuple[str, Event | Kept] | None] = queue.SimpleQueue()
        self._writer = FilmWriter(shelf, lambda job_id, event: self._events.put((job_id, event)))
        self._tidying = Tidying(store, shelf, models, limits.bytes)
        self._running: dict[str, _Running] = {}  # by id; the thread's own
        self._suspect = False  # the one that runs was begun before, by a worker that ended: no company
        self._stopping = self._draining = False
        self._hungry = True  # there may be a job that this server could take
        self._rest_until = 0.0
        self._renewed = self._tidied = self._counted = 0.0
        self._counts: dict[str, int] = {}
        self._line: Line | None = None
        self._thread = threading.Thread(target=self._main, name="rmd-jobs", daemon=True)

    # -- called from any thread --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take up what was left unfinished, then whatever comes."""
        self._events.put(None)  # at once, not at the first tick
        self.store.listen(lambda: self._events.put(None))
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False where nobody would make the films that are taken."""
        return self._thread.is_alive()

    def stop(self, timeout: float = LAST_JOBS_SECONDS) -> None:
        """Write down the last events, give back what is unfinished, and end. The executor must have stopped."""
        self._stopping = True
        self._events.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def earlier(self, account: str, key: str, body_digest: str) -> VideoJob | None:
        """Return the job that an earlier request with this Idempotency-Key made, on whichever server.

        Raises:
            RequestError: 409 where that had another body.
        """
        found = self.store.keyed(account, key, time.time())
        if found is not None and found.body_digest != body_digest:
            raise key_reused()
        return found

    def accept(self, job: VideoJob) -> VideoJob:
        """Keep a new job; it will be finished or reported failed.

        Returns:
            ``job``, or the one that a request with its idempotency key made meanwhile.

        Raises:
            RequestError: 429 where too many wait, or too many of one account, 409 where that other request had another
                body, 503 where the database does not take it.
        """
        self.store.check()
        job.begin_by = job.created_at + self._limits.seconds
        if not self._admitting.acquire(timeout=_ADMIT_SECONDS):
            raise DatabaseError("it does not answer in time")
        try:
            self.store.check()  # whoever was before may have found that it fails: not to wait for it one by one
            found = self.store.queue(self._models, job.account)
            if not found.all:
                self._promises.begin()
            self._check_room(found)
            job.turn = found.turn
            kept = self.store.add(job, time.time())
        finally:
            self._admitting.release()
        if kept.body_digest != job.body_digest:
            raise key_reused()
        self._events.put(None)
        return kept

    def _check_room(self, found: Queue) -> None:
        most, may = self._limits.queue, max(int(self._limits.share * self._limits.queue), 1)
        code: str | None = None
        if found.all >= most:
            surplus = found.all - most + 1
            text = f"{found.all} films wait or are being made, and {most} may"
        elif found.own >= may:
            surplus, code = found.own - may + 1, "key_share_used"
            text = f"This API key has {found.own} films in line, and may have {may}"
        else:
            return
        raise RequestError(
            Fault.QUEUE_FULL,
            f"{text}; try again after the seconds in Retry-After.",
            code=code,
            retry_after=self._promises.make(surplus, 1),
        )

    def remove(self, job: VideoJob) -> None:
        """Cancel an unfinished job, which then reads as failed; forget a finished one and its film.

        Raises:
            StoreError: the film is still there, and so is its job.
        """
        now = time.time()
        if self.store.cancel(job.id, now, now + self._limits.seconds):
            self._events.put((job.id, Failed(_cancelled())))
            self._maker.ended(job, _cancelled().fault.value.outcome)
            return
        self.shelf.remove(job.id)  # first: nobody would find what a forgotten job had left
        self.store.delete(job.id)

    def counts(self) -> dict[str, int]:
        """Return the number of the served models' jobs by status, as the thread last read them."""
        return self._counts

    def line(self) -> Line | None:
        """Return what waits, as the thread last read it; None until then."""
        return self._line

    # -- the thread --------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        event: tuple[str, Event | Kept] | None = None
        while True:
            if event is None:
                event = self._next()
            try:
                if event is not None:
                    self._heed(*event)
                    event = None
                if self._stopping and self._events.empty():
                    self._writer.finish(_LAST_FILMS_SECONDS)
                    if self._events.empty():
                        self._give_back()
                        return
                if not self._stopping:
                    self._renew()
                    self._write_progress()
                    self._tidy()
                    self._feed()
                    self._count()
            except DatabaseError as fault:
                # What has not been written down is tried again: a finished film must not be lost to a locked database.
                log.error("films wait for the database: %s", fault.reason)
                if self._stopping:
                    return
                time.sleep(_RETRY_SECONDS)
            except Exception:  # of one job: its lease lapses, and it is tried again a few times
                log.exception("a video job could not be handled")
                if event is not None:
                    self._running.pop(event[0], None)
                event = None

    def _next(self) -> tuple[str, Event | Kept] | None:
        """Wait for an event, or until there is something else to be done."""
        wait = _TICK_SECONDS
        if any(each.progress != each.written for each in self._running.values()):
            wait = min(wait, _PROGRESS_SECONDS)
        try:
            event = self._events.get(timeout=wait)
        except queue.Empty:
            event = None
        self._hungry |= event is None
        return event

    def _feed(self) -> None:
        """Give waiting jobs to the executor while it takes them."""
        if self._draining or not self._hungry or time.monotonic() < self._rest_until:
            return
        while len(self._running) < (1 if self._suspect else self._limits.together):
            job = self.store.claim(self._models, self._worker, _LEASE_SECONDS)
            if job is None:
                self._hungry = False
                return
            if job.attempts >= _MOST_ATTEMPTS:
                text = f"{_MOST_ATTEMPTS} times a server stopped while it made this film."
                self._fail(job, RequestError(Fault.ENGINE_FAILED, text))
                continue
            if job.attempts and self._running:  # it may have been the cause: not in company
                self._hungry = False
                self.store.release(job.id, self._worker)
                return
            try:
                spec = self._maker.prepare(job.request)
                self._running[job.id] = _Running(job, self._maker.submit(spec, self._sink(job.id), job.id))
                self._suspect = job.attempts > 0
            except RequestError as error:
                if error.fault.value.retry:  # full, draining: it stays in line
                    self._hungry, self._draining = False, error.fault is Fault.DRAINING
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

    def _heed(self, job_id: str, event: Event | Kept) -> None:
        """Write down one event of a job that runs here, or did."""
        running = self._running.get(job_id)
        if running is None:
            if isinstance(event, Kept):
                self._writer.aside(lambda: self._tidying.remove_unless_kept(job_id))
            return
        if isinstance(event, Advanced):
            running.progress = math.floor(99 * event.share)
            return
        if isinstance(event, FinishedPicture):
            self._writer.keep(job_id, event)
            return
        if isinstance(event, Kept):
            self._finish(running.job, running.generation, event)
        elif isinstance(event, Failed):
            if event.error.code == CANCELLED:
                self._maker.cancel(running.generation, event.error)
            elif event.error.fault is Fault.DRAINING:
                self.store.release(job_id, self._worker)
            elif event.error.fault is Fault.LACKING:
                log.error("the film of %s goes back in line: %s", job_id, event.error.message)
                self.store.release(job_id, self._worker)
                self._rest_until = time.monotonic() + _TICK_SECONDS
            elif event.error.fault is Fault.NOT_READY:  # the device broke, perhaps by this very film
                self.store.release(job_id, self._worker, counts=True)
            else:
                self._fail(running.job, event.error)
        self._end(job_id)

    def _end(self, job_id: str) -> None:
        self._running.pop(job_id, None)
        self._hungry = True

    def _write_progress(self) -> None:
        """Write what has changed, of each job at most once a second: the table is on a disk."""
        now = time.monotonic()
        for job_id, running in list(self._running.items()):
            if running.progress != running.written and now - running.written_at >= _PROGRESS_SECONDS:
                if self.store.advance(job_id, self._worker, running.progress):
                    running.written, running.written_at = running.progress, now
                else:
                    self._drop(job_id)

    def _finish(self, job: VideoJob, generation: Generation, kept: Kept) -> None:
        now = time.time()
        report = self._maker.report(generation, kept.film)
        if self.store.complete(job.id, self._worker, now, now + self._limits.seconds, kept.size, report):
            self._promises.finished(1)
            self._maker.ended(job, COMPLETED)
            self._writer.aside(self._tidying.let_go)
        else:
            self._writer.aside(lambda: self._tidying.remove_unless_kept(job.id))

    def _fail(self, job: VideoJob, error: RequestError) -> None:
        now = time.time()
        if self.store.fail(job.id, self._worker, now, now + self._limits.seconds, error.code, error.message):
            self._maker.ended(job, error.fault.value.outcome)

    def _drop(self, job_id: str) -> None:
        """Stop working on a job that is no longer ours."""
        self._maker.cancel(self._running[job_id].generation, _cancelled())
        self._end(job_id)

    def _renew(self) -> None:
        now = time.monotonic()
        if self._renewed and now - self._renewed < _LEASE_SECONDS / 3:
            return
        for job_id in list(self._running):
            if not self.store.renew(job_id, self._worker, _LEASE_SECONDS):
                self._drop(job_id)
        self._renewed = now  # only now: after a failed attempt nothing is claimed before what runs here is held again

    def _tidy(self) -> None:
        now = time.time()
        if now - self._tidied < _TIDY_SECONDS:
            return
        self._tidied = now
        for job in self.store.give_up_waiting(now, self._limits.seconds):
            self._maker.ended(job, deadline_error().fault.value.outcome)
        self.store.forget_surplus(_MOST_ENDED)
        self._writer.aside(self._tidying.let_go)

    def _count(self) -> None:
        """Read the numbers that gauges show: a scrape must not wait for the database."""
        now = time.monotonic()
        if now - self._counted >= _PROGRESS_SECONDS:
            self._counts, self._line = self.store.counts(self._models), self.store.line(self._models)
            self._counted = now

    def _give_back(self) -> None:
        for job_id in self._running:
            self.store.release(job_id, self._worker)
        self._running.clear()


def _cancelled() -> RequestError:
    return RequestError(Fault.CLIENT_GONE, "The job was cancelled.", code=CANCELLED)
