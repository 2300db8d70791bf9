"""The table of video jobs.

A worker holds a job by a lease that it renews while it works. Whatever ends a worker ends its leases, and the job is
anybody's again: that is all there is to surviving a restart, and several servers may share one database. Every
change of a job's state is one conditional UPDATE, so that of two that race only one counts. Leases are of the
database's clock, since those of several machines differ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, case, delete, func, or_, select, update
from sqlalchemy.exc import IntegrityError

from server.films.database import Database
from server.films.tables import ENDED, OPEN, Clock, VideoJob, seconds_from_now

CANCELLED = "cancelled"
_CHANNEL = "rmd_videos"
_DELETED = "deleted"  # the account of what nobody is to see any more; no digest of a key


@dataclass(frozen=True)
class Page:
    """A part of a list of jobs, and whether more follow."""

    jobs: Sequence[VideoJob]
    has_more: bool


@dataclass(frozen=True)
class Line:
    """Films that wait. ``oldest``: when it was sent, seconds since 1970. ``unserved``: unfinished, of other models."""

    waiting: int
    oldest: float | None
    unserved: int


@dataclass(frozen=True)
class Queue:
    """The jobs that wait or are worked on, as one account finds them.

    Attributes:
        all, own: how many, and how many of them are the account's.
        turn: of its next one: behind its own, and level with who is served now. So accounts are served one by one,
            however much each has sent (start-time fair queueing; Goyal, Vin and Cheng, 1996).
    """

    all: int
    own: int
    turn: int


class JobStore:
    """All reads and writes of the table. Used from any thread.

    Raises (each of them):
        DatabaseError: the database failed, and nothing was changed.
    """

    def __init__(self, database: Database) -> None:
        self._database, self._begin, self.check = database, database.begin, database.check
        self._skips_locked = database.dialect == "postgresql"

    def listen(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called, from another thread, whenever a job can be taken, as far as the database tells."""
        self._database.listen(_CHANNEL, wake)

    # -- clients -----------------------------------------------------------------------------------------------------

    def add(self, job: VideoJob, now: float = 0.0) -> VideoJob:
        """Write a new job; once this returns, it is not lost.

        Returns:
            ``job``, or that of an earlier request with its idempotency key that had not expired at ``now``.
        """
        if job.idempotency_key is not None:
            past = [VideoJob.idempotency_key == job.idempotency_key, VideoJob.expires_at <= now]
            self._change([VideoJob.account == job.account, *past], idempotency_key=None)
        try:
            with self._begin() as session:
                session.add(job)
                self._database.notify(session, _CHANNEL)
        except IntegrityError:
            earlier = None if job.idempotency_key is None else self.keyed(job.account, job.idempotency_key, now)
            if earlier is None:
                raise
            return earlier
        return job

    def keyed(self, account: str, key: str, now: float) -> VideoJob | None:
        """Return the job that an account's request with this idempotency key made, unless it had expired."""
        with self._begin() as session:
            mine = VideoJob.account == account, VideoJob.idempotency_key == key
            return session.scalar(select(VideoJob).where(*mine, _is_there(now)))

    def get(self, account: str, job_id: str, now: float = 0.0) -> VideoJob | None:
        """Return a job of this account, unless it had expired at ``now``."""
        if not _is_name(job_id):
            return None
        with self._begin() as session:
            mine = VideoJob.id == job_id, VideoJob.account == account
            return session.scalar(select(VideoJob).where(*mine, _is_there(now)))

    def page(self, account: str, after: str | None, limit: int, newest_first: bool, now: float = 0.0) -> Page:
        """Return up to ``limit`` of an account's jobs that had not expired at ``now``, those behind the job ``after``.

        That one may have been deleted: clients delete what they page through.

        Raises:
            KeyError: there is no such job.
        """
        if after is not None and not _is_name(after):
            raise KeyError(after)
        query = select(VideoJob).where(VideoJob.account == account, _is_there(now))
        order = VideoJob.number.desc() if newest_first else VideoJob.number.asc()
        known = VideoJob.account.in_((account, _DELETED))
        with self._begin() as session:
            if after is not None:
                cursor = session.scalar(select(VideoJob.number).where(VideoJob.id == after, known))
                if cursor is None:
                    raise KeyError(after)
                query = query.where(VideoJob.number < cursor if newest_first else VideoJob.number > cursor)
            found = session.scalars(query.order_by(order).limit(limit + 1)).all()
        return Page(found[:limit], len(found) > limit)

    def cancel(self, job_id: str, now: float, expires_at: float) -> bool:
        """End a job that is not finished; False where it is."""
        values = {"error_code": CANCELLED, "error_message": "The job was cancelled.", "progress": 0}
        return self._change(_is_open(job_id), status="failed", completed_at=now, expires_at=expires_at, **values)

    def delete(self, job_id: str) -> None:
        """Forget a finished job, but for its place in the list, which is kept until it would have expired."""
        ended = [VideoJob.id == job_id, VideoJob.status.not_in(OPEN)]
        self._change(ended, account=_DELETED, idempotency_key=None, request={}, report=None, bytes=0)

    def queue(self, models: Collection[str], account: str) -> Queue:
        """Return what an account that sends another job of these models finds there."""
        mine, waits = VideoJob.account == account, VideoJob.worker.is_(None)
        query = select(
            func.count(),
            func.count(case((mine, 1))),
            func.max(case((mine, VideoJob.turn))),
            func.min(case((waits, VideoJob.turn))),
            func.max(case((~waits, VideoJob.turn))),
        ).where(VideoJob.status.in_(OPEN), VideoJob.model.in_(models))
        with self._begin() as session:
            everything, own, last, next_one, begun = session.execute(query).one()
        now = next((turn for turn in (next_one, begun) if turn is not None), 0)
        return Queue(everything, own, now if last is None else max(now, last + 1))

    def counts(self, models: Collection[str]) -> dict[str, int]:
        """Return the number of these models' jobs by status."""
        there = VideoJob.model.in_(models), VideoJob.account != _DELETED
        query = select(VideoJob.status, func.count()).where(*there).group_by(VideoJob.status)
        with self._begin() as session:
            found = dict(session.execute(query).tuples().all())
        return {status: found.get(status, 0) for status in OPEN + ENDED}

    def line(self, models: Collection[str]) -> Line:
        """Return what waits."""
        served = VideoJob.model.in_(models)
        # Those of workers that ended wait too, for whoever comes.
        waiting = or_(VideoJob.status == "queued", VideoJob.lease_until < Clock())
        unserved = func.coalesce(func.sum(case((served, 0), else_=1)), 0)
        with self._begin() as session:
            count, oldest = session.execute(
                select(func.count(), func.min(VideoJob.created_at)).where(VideoJob.status.in_(OPEN), served, waiting)
            ).one()
            others = session.scalar(select(unserved).where(VideoJob.status.in_(OPEN)))
        return Line(count, oldest, int(others or 0))

    # -- the worker --------------------------------------------------------------------------------------------------

    def claim(self, models: Collection[str], worker: str, seconds: float) -> VideoJob | None:
        """Take the next job of these models that nobody holds, for so long; None where there is none."""
        free = (VideoJob.model.in_(models), VideoJob.status.in_(OPEN), VideoJob.lease_until <= Clock())
        first = select(VideoJob.number).where(*free).order_by(VideoJob.turn, VideoJob.number).limit(1)
        if self._skips_locked:  # else all that claim at once would wait for the same row; SQLite has one writer anyway
            first = first.with_for_update(skip_locked=True)
        # Had it been begun before, it waits again: what was done of it is gone.
        mine = {"worker": worker, "lease_until": seconds_from_now(seconds), "status": "queued", "progress": 0}
        taken = update(VideoJob).where(VideoJob.number == first.scalar_subquery()).values(**mine)
        with self._begin() as session:
            return session.scalar(taken.returning(VideoJob))

    def renew(self, job_id: str, worker: str, seconds: float) -> bool:
        """Hold a job for so long; False where it is no longer this worker's (cancelled, or the lease had lapsed)."""
        return self._change(_is_held(job_id, worker), lease_until=seconds_from_now(seconds))

    def advance(self, job_id: str, worker: str, progress: int) -> bool:
        """Note that work begins, or goes on."""
        begun = case((VideoJob.status == "queued", 1), else_=0)
        values = {"progress": progress, "attempts": VideoJob.attempts + begun}
        return self._change(_is_held(job_id, worker), status="in_progress", **values)

    def complete(
        self,
        job_id: str,
        worker: str,
        now: float,
        expires_at: float,
        files_bytes: int,
        report: Mapping[str, Any],
    ) -> bool:
        """Finish a job whose files lie on the shelf."""
        done = {"status": "completed", "progress": 100, "completed_at": now, "expires_at": expires_at}
        return self._change(_is_held(job_id, worker), **done, bytes=files_bytes, report=dict(report))

    def fail(self, job_id: str, worker: str, now: float, expires_at: float, code: str, message: str) -> bool:
        """End a job without a film."""
        why = {"error_code": code, "error_message": message}
        return self._change(_is_held(job_id, worker), status="failed", completed_at=now, expires_at=expires_at, **why)

    def release(self, job_id: str, worker: str, counts: bool = False) -> bool:
        """Give a job back unfinished: it may begin again at once, here or elsewhere.

        Args:
            counts: it may have been the cause; otherwise having begun it does not count as an attempt.
        """
        begun = 0 if counts else case((VideoJob.status == "in_progress", 1), else_=0)
        values = {"worker": None, "lease_until": 0.0, "attempts": VideoJob.attempts - begun}
        return self._change(_is_held(job_id, worker), **values, status="queued", progress=0)

    # -- tidying -----------------------------------------------------------------------------------------------------

    def give_up_waiting(self, now: float, life: float) -> list[VideoJob]:
        """Fail jobs that nobody has taken by when they had to be, such as those of a model that is no longer served.

        Args:
            now: seconds since 1970.
            life: how long such a job is told of; one of before there was a ``begin_by`` may wait as long.
        """
        why = {"error_code": "deadline_exceeded", "error_message": "No server took the job in time."}
        late = func.coalesce(VideoJob.begin_by, VideoJob.created_at + life) < now
        waiting = VideoJob.status.in_(OPEN), VideoJob.lease_until <= Clock(), late
        given_up = (
            update(VideoJob).where(*waiting).values(status="failed", completed_at=now, expires_at=now + life, **why)
        )
        with self._begin() as session:
            return list(session.scalars(given_up.returning(VideoJob)))

    def expired(self, now: float) -> list[str]:
        """Return the ids of the ended jobs whose time has passed."""
        with self._begin() as session:
            return list(session.scalars(select(VideoJob.id).where(*_has_expired(now))))

    def has_ended_without(self, job_id: str) -> bool:
        """Whether a job is gone, or ended without a film."""
        with self._begin() as session:
            status = session.scalar(select(VideoJob.status).where(VideoJob.id == job_id))
        return status in (None, "failed")

    def forget_expired(self, now: float) -> None:
        """Delete the jobs whose time has passed; their files must be gone."""
        with self._begin() as session:
            session.execute(delete(VideoJob).where(*_has_expired(now)))

    def forget_surplus(self, most: int) -> None:
        """Delete the oldest ended jobs without files beyond ``most``: requests cost little, and so are not bounded."""
        ended = select(VideoJob.number).where(VideoJob.status.not_in(OPEN), VideoJob.bytes == 0)
        kept_from = ended.order_by(VideoJob.number.desc()).offset(most).limit(1)
        with self._begin() as session:
            last = session.scalar(kept_from)
            if last is not None:
                surplus = VideoJob.status.not_in(OPEN), VideoJob.bytes == 0, VideoJob.number <= last
                session.execute(delete(VideoJob).where(*surplus))

    def with_files(self, models: Collection[str] | None = None) -> list[VideoJob]:
        """Return the jobs (of these models) that have files, those finished first in front."""
        query = select(VideoJob).where(VideoJob.bytes > 0).order_by(VideoJob.completed_at, VideoJob.number)
        if models is not None:
            query = query.where(VideoJob.model.in_(models))
        with self._begin() as session:
            return list(session.scalars(query))

    def drop_files(self, job_id: str, now: float) -> None:
        """Let a job expire now; its files are to be removed."""
        self._change([VideoJob.id == job_id], bytes=0, expires_at=now)

    def _change(self, which: Sequence[ColumnElement[bool]], **values: Any) -> bool:
        with self._begin() as session:
            result = session.execute(update(VideoJob).where(*which).values(**values))
        return bool(result.rowcount)  # type: ignore[attr-defined]


def _is_name(text: str) -> bool:
    """Whether a job may be called so. PostgreSQL refuses to look for texts with a NUL: it would seem to have failed."""
    return text.isascii() and text.isprintable()


def _is_there(now: float) -> ColumnElement[bool]:
    return or_(VideoJob.expires_at.is_(None), VideoJob.expires_at > now)


def _has_expired(now: float) -> tuple[ColumnElement[bool], ...]:
    return VideoJob.status.not_in(OPEN), VideoJob.expires_at <= now


def _is_open(job_id: str) -> list[ColumnElement[bool]]:
    return [VideoJob.id == job_id, VideoJob.status.in_(OPEN)]


def _is_held(job_id: str, worker: str) -> list[ColumnElement[bool]]:
    return [*_is_open(job_id), VideoJob.worker == worker]
