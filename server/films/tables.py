"""The tables of what outlasts a process: video jobs, and replies to requests with an ``Idempotency-Key``.

`server/films/migrations` makes them and brings older ones up to date; a test holds the two to each other.
"""

from __future__ import annotations

import secrets
from typing import Any, Literal

from sqlalchemy import JSON, BigInteger, Boolean, ColumnElement, Float, Index, String, type_coerce
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, column_property, mapped_column
from sqlalchemy.sql.functions import FunctionElement

Status = Literal["queued", "in_progress", "completed", "failed"]
OPEN: tuple[Status, ...] = ("queued", "in_progress")
ENDED: tuple[Status, ...] = ("completed", "failed")


class Clock(FunctionElement[float]):
    """Seconds since 1970 by the database's clock: leases of servers on several machines are compared by it."""

    inherit_cache = True
    type = Float()


@compiles(Clock, "sqlite")
def _sqlite_clock(*_: object, **__: object) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(Clock, "postgresql")
def _postgresql_clock(*_: object, **__: object) -> str:
    return "extract(epoch from clock_timestamp())::float8"


class Base(MappedAsDataclass, DeclarativeBase):
    """Of all tables."""


CARRIER = "trace"
"""In a job's request, beside what was asked for: the headers by which its trace goes on, where it is traced."""


class VideoJob(Base):
    """One job. Times are seconds since 1970.

    Attributes:
        id: its name on the wire.
        account: digest of the API key it belongs to; other keys do not see it.
        model: the served model's id.
        request: the validated request, with its seed drawn: what the film is made from, whenever it is made.
        seconds, size: as replied, such as "5" and "832x480".
        idempotency_key, body_digest: of the request that made it, where it had a key.
        turn: those of lower ones are made first; its place among those of other accounts.
        begin_by: it is given up where nobody has taken it by then; absent in jobs of before this column.
        worker, lease_until: who works on it, and until when nobody else may, by the database's clock.
        attempts: how often a worker began it, this one included. Only a first step begins a job.
        bytes: of its files; 0 where there are none (any more).
        report: the ``rmd`` object, once it is finished.
        left: nobody holds it, by the clock of the database, as it was read (by `get` and `page`).
    """

    __tablename__ = "videos"
    __table_args__ = (Index("ix_videos_idempotency", "account", "idempotency_key", unique=True),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True, init=False)
    account: Mapped[str] = mapped_column(String(64), index=True)
    model: Mapped[str] = mapped_column(String(256))
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    seconds: Mapped[str] = mapped_column(String(32))
    size: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[float]
    remixed_from: Mapped[str | None] = mapped_column(String(64), default=None)
    idempotency_key: Mapped[str | None] = mapped_column(String(256), default=None)
    body_digest: Mapped[str | None] = mapped_column(String(64), default=None)
    turn: Mapped[int] = mapped_column(default=0, server_default="0")
    begin_by: Mapped[float | None] = mapped_column(default=None)
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

    left: Mapped[bool] = column_property(type_coerce(lease_until <= Clock(), Boolean), init=False)

    @property
    def asked(self) -> dict[str, Any]:
        """What its film is made from."""
        return {name: value for name, value in self.request.items() if name != CARRIER}

    @property
    def open(self) -> bool:
        """True while it waits or is worked on."""
        return self.status in OPEN


class IdempotentReply(Base):
    """What a request with an ``Idempotency-Key`` was answered, or that it is being answered.

    Attributes:
        account, key: whose it is, and the header's value.
        body_digest: of the request.
        worker, lease_until: who makes it, and until when nobody else may, by the database's clock.
        finished_at: when it was made; absent while it is being made.
        reply: JSON, once it is made.
    """

    __tablename__ = "idempotent_replies"

    account: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(256), primary_key=True)
    body_digest: Mapped[str] = mapped_column(String(64))
    worker: Mapped[str] = mapped_column(String(64))
    lease_until: Mapped[float]
    finished_at: Mapped[float | None] = mapped_column(default=None, index=True)
    reply: Mapped[bytes | None] = mapped_column(default=None)


def seconds_from_now(seconds: float) -> ColumnElement[float]:
    """Return that time, by the database's clock."""
    return Clock() + seconds
