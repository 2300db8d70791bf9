"""The table of video jobs (SQLAlchemy; SQLite by default, PostgreSQL by URL).

A worker holds a job by a lease that it renews while it works. Whatever ends a worker ends its leases, and the job is
anybody's again: that is all there is to surviving a restart, and several servers may share one database. Every
change of a job's state is one conditional UPDATE, so that of two that race only one counts.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    Engine,
    String,
    case,
    create_engine,
    delete,
    event,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

Status = Literal["queued", "in_progress", "completed", "failed"]
_OPEN: tuple[Status, ...] = ("queued", "in_progress")
_ENDED: tuple[Status, ...] = ("completed", "failed")
CANCELLED = "cancelled"
CARRIER = "trace"
"""In a job's request, beside what was asked for: the headers by which its trace goes on, where it is traced."""
_DELETED = "deleted"  # the account of what nobody is to see any more; no digest of a key


class _Base(MappedAsDataclass, DeclarativeBase):
    pass


class VideoJob(_Base):
    """One job. Times are seconds since 1970.

    Attributes:
        id: its name on the wire.
        account: digest of the API key it belongs to; other keys do not see it.
        model: the served model's id.
        request: the validated request, with its seed drawn: what the film is made from, whenever it is made.
        seconds, size: as replied, such as "5" and "832x480".
        worker, lease_until: who works on it, and until when nobody else may.
        attempts: how often a worker began it, this one included. Only a first step begins a job.
        bytes: of its files; 0 where there are none (any more).
        report: the ``rmd`` object, once it is finished.
    """

    __tablename__ = "videos"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True, init=False)
    account: Mapped[str] = mapped_column(String(64), index=True)
    model: Mapped[str] = mapped_column(String(256))
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    seconds: Mapped[str] = mapped_column(String(32))
    size: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[float]
    remixed_from: Mapped[str | None] = mapped_column(String(64), default=None)
    id: Mapped[str] = mapped_column(
        String(64), unique=True, default_factory=lambda: f"video_{secrets.token_hex(16)}", init=False
    )
    status: Mapped[Status] = mapped_column(String(16), default="queued", index=True)
    progress: Mapped[int] = mapped_column(default=0)
    completed_at: Mapped[float | None] = mapped_column(default=None)
    expires_at: Mapped[float | None] = mapped_column(default=None)
    error_code: Mapped[str | None] = mapped_column(String(64), default=None)
    error_message: Mapped[str | None] = mapped_column(default=None)
    worker: Mapped[str | None] = mapped_column(String(64), default=None)
    lease_until: Mapped[float] = mapped_column(default=0.0)
    attempts: Mapped[int] = mapped_column(default=0)
    bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    report: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)

    @property
    def asked(self) -> dict[str, Any]:
        """What its film is made from."""
        return {name: value for name, value in self.request.items() if name != CARRIER}

    @property
    def open(self) -> bool:
        """True while it waits or is worked on."""
        return self.status in _OPEN


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


class JobStore:
    """All reads and writes of the table. Used from any thread.

    Args:
        url: an SQLAlchemy database URL.

    Raises:
        ValueError: the database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            self._engine = create_engine(url)
            if self._engine.dialect.name == "sqlite":
                _make_durable(self._engine)
            _Base.metadata.create_all(self._engine)
        except (SQLAlchemyError, ImportError) as error:
            # The URL may hold a password, and drivers quote it.
            raise ValueError(
                f"the database of video jobs cannot be opened ({type(error).__name__}); check video_database"
            ) from None

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def _session(self) -> Session:
        return Session(self._engine, expire_on_commit=False)

    # -- clients -----------------------------------------------------------------------------------------------------

    def add(self, job: VideoJob) -> VideoJob:
        """Write a new job; once this returns, it is not lost."""
        with self._session() as session, session.begin():
            session.add(job)
        return job

    def get(self, account: str, job_id: str, now: float = 0.0) -> VideoJob | None:
        """Return a job of this account, unless it had expired at ``now``."""
        with self._session() as session:
            mine = VideoJob.id == job_id, VideoJob.account == account
            return session.scalar(select(VideoJob).where(*mine, _is_there(now)))

    def page(self, account: str, after: str | None, limit: int, newest_first: bool, now: float = 0.0) -> Page:
        """Return up to ``limit`` of an account's jobs that had not expired at ``now``, those behind the job ``after``.

        That one may have been deleted: clients delete what they page through.

        Raises:
            KeyError: there is no such job.
        """
        query = select(VideoJob).where(VideoJob.account == account, _is_there(now))
        order = VideoJob.number.desc() if newest_first else VideoJob.number.asc()
        known = VideoJob.account.in_((account, _DELETED))
        with self._session() as session:
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
        ended = [VideoJob.id == job_id, VideoJob.status.not_in(_OPEN)]
        self._change(ended, account=_DELETED, request={}, report=None, bytes=0)

    def count_open(self, models: Collection[str]) -> int:
        """Return how many jobs of these models wait or are worked on."""
        query = select(func.count()).where(VideoJob.status.in_(_OPEN), VideoJob.model.in_(models))
        with self._session() as session:
            return session.scalar(query) or 0

    def counts(self, models: Collection[str]) -> dict[str, int]:
        """Return the number of these models' jobs by status."""
        there = VideoJob.model.in_(models), VideoJob.account != _DELETED
        query = select(VideoJob.status, func.count()).where(*there).group_by(VideoJob.status)
        with self._session() as session:
            found = dict(session.execute(query).tuples().all())
        return {status: found.get(status, 0) for status in _OPEN + _ENDED}

    def line(self, models: Collection[str]) -> Line:
        """Return what waits."""
        served = VideoJob.model.in_(models)
        # Those of workers that ended wait too, for whoever comes.
        waiting = or_(VideoJob.status == "queued", VideoJob.lease_until < time.time())
        unserved = func.coalesce(func.sum(case((served, 0), else_=1)), 0)
        with self._session() as session:
            count, oldest = session.execute(
                select(func.count(), func.min(VideoJob.created_at)).where(VideoJob.status.in_(_OPEN), served, waiting)
            ).one()
            others = session.scalar(select(unserved).where(VideoJob.status.in_(_OPEN)))
        return Line(count, oldest, int(others or 0))

    # -- the worker --------------------------------------------------------------------------------------------------

    def claim(self, models: Collection[str], worker: str, now: float, lease_until: float) -> VideoJob | None:
        """Take the oldest job of these models that nobody holds; None where there is none."""
        free = (VideoJob.model.in_(models), VideoJob.status.in_(_OPEN), VideoJob.lease_until <= now)
        while True:
            with self._session() as session:
                found = session.scalar(select(VideoJob).where(*free).order_by(VideoJob.number).limit(1))
            if found is None:
                return None
            # Had it been begun before, it waits again: what was done of it is gone.
            mine = {"worker": worker, "lease_until": lease_until, "status": "queued", "progress": 0}
            if self._change([VideoJob.id == found.id, *free], **mine):
                return found

    def renew(self, job_id: str, worker: str, lease_until: float) -> bool:
        """Hold a job for longer; False where it is no longer this worker's (cancelled, or the lease had lapsed)."""
        return self._change(_is_held(job_id, worker), lease_until=lease_until)

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
        return self._change(_is_held(job_id, worker), status="queued", progress=0, **values)

    # -- tidying -----------------------------------------------------------------------------------------------------

    def give_up_waiting(self, now: float, created_before: float, expires_at: float) -> None:
        """Fail jobs that nobody has taken for too long, such as those of a model that is no longer served."""
        why = {"error_code": "deadline_exceeded", "error_message": "No server took the job in time."}
        waiting = [VideoJob.status.in_(_OPEN), VideoJob.lease_until <= now, VideoJob.created_at < created_before]
        self._change(waiting, status="failed", completed_at=now, expires_at=expires_at, **why)

    def forget_expired(self, now: float) -> None:
        """Delete the jobs whose time has passed; their files are the shelf's to sweep."""
        with self._session() as session, session.begin():
            session.execute(delete(VideoJob).where(VideoJob.status.not_in(_OPEN), VideoJob.expires_at <= now))

    def forget_surplus(self, most: int) -> None:
        """Delete the oldest ended jobs without files beyond ``most``: requests cost little, and so are not bounded."""
        ended = select(VideoJob.number).where(VideoJob.status.not_in(_OPEN), VideoJob.bytes == 0)
        kept_from = ended.order_by(VideoJob.number.desc()).offset(most).limit(1)
        with self._session() as session, session.begin():
            last = session.scalar(kept_from)
            if last is not None:
                surplus = VideoJob.status.not_in(_OPEN), VideoJob.bytes == 0, VideoJob.number <= last
                session.execute(delete(VideoJob).where(*surplus))

    def with_files(self) -> list[VideoJob]:
        """Return the jobs that have files, those finished first in front."""
        query = select(VideoJob).where(VideoJob.bytes > 0).order_by(VideoJob.completed_at, VideoJob.number)
        with self._session() as session:
            return list(session.scalars(query))

    def drop_files(self, job_id: str, now: float) -> None:
        """Note that a job's files are gone, and the job with them."""
        self._change([VideoJob.id == job_id], bytes=0, expires_at=now)

    def _change(self, which: Sequence[ColumnElement[bool]], **values: Any) -> bool:
        with self._session() as session, session.begin():
            result = session.execute(update(VideoJob).where(*which).values(**values))
        return bool(result.rowcount)  # type: ignore[attr-defined]


def _is_there(now: float) -> ColumnElement[bool]:
    return or_(VideoJob.expires_at.is_(None), VideoJob.expires_at > now)


def _is_open(job_id: str) -> list[ColumnElement[bool]]:
    return [VideoJob.id == job_id, VideoJob.status.in_(_OPEN)]


def _is_held(job_id: str, worker: str) -> list[ColumnElement[bool]]:
    return [*_is_open(job_id), VideoJob.worker == worker]


def _make_durable(engine: Engine) -> None:
    """Let readers and the writer work side by side, and let a committed job outlast a power cut."""

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA busy_timeout=10000")
        cursor.close()
