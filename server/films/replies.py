"""Replies to requests with an ``Idempotency-Key``, for all servers of one database.

A row is there from the moment that somebody begins to make a reply, and is theirs by a lease: a server that was
killed leaves it to the next one that is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Result, and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from server.films.database import Database
from server.films.tables import Clock, IdempotentReply, seconds_from_now


@dataclass(frozen=True)
class Found:
    """What is known of a key.

    Attributes:
        mine: it is the asking worker's to make.
        body_digest: of the request that it was used with.
        finished_at: when the reply was made; None while it is being made.
        reply: None while it is being made.
    """

    mine: bool
    body_digest: str
    finished_at: float | None = None
    reply: bytes | None = None


class ReplyStore:
    """All reads and writes of the table. Used from any thread.

    Args:
        database: where it lies.
        max_replies: the oldest finished reply is forgotten beyond this.
        max_bytes: likewise; a larger reply is not kept at all.
        life_seconds: how long a reply is kept.

    Raises (each method):
        DatabaseError: the database failed, and nothing was changed.
    """

    def __init__(self, database: Database, max_replies: int, max_bytes: int, life_seconds: float) -> None:
        self._begin, self._check = database.begin, database.check
        self._max, self._max_bytes, self._life = max_replies, max_bytes, life_seconds

    def claim(self, account: str, key: str, body_digest: str, worker: str, seconds: float) -> Found:
        """Begin to make a reply, by a lease of so long, or say what is known of it already."""
        self._check()
        lapsed = and_(IdempotentReply.finished_at.is_(None), IdempotentReply.lease_until <= Clock())
        with self._begin() as session:
            session.execute(delete(IdempotentReply).where(*_of(account, key), or_(lapsed, self._old())))
        values = {"account": account, "key": key, "body_digest": body_digest, "worker": worker}
        new = insert(IdempotentReply).values(**values, lease_until=seconds_from_now(seconds))
        try:
            with self._begin() as session:
                session.execute(new)
        except IntegrityError:
            with self._begin() as session:
                found = session.scalar(select(IdempotentReply).where(*_of(account, key)))
            if found is None:  # given up just now: to be asked for again
                return Found(False, body_digest)
            return Found(False, found.body_digest, found.finished_at, found.reply)
        return Found(True, body_digest)

    def renew(self, account: str, key: str, worker: str, seconds: float) -> None:
        """Hold it for so long from now."""
        held = update(IdempotentReply).where(*_of(account, key), IdempotentReply.worker == worker)
        with self._begin() as session:
            session.execute(held.values(lease_until=seconds_from_now(seconds)))

    def finish(self, account: str, key: str, worker: str, reply: bytes) -> bool:
        """Keep a reply, unless it is too large, and forget the oldest ones where there are too many.

        Returns:
            Whether it was still the worker's to say; where the lease had lapsed, another's reply may count.
        """
        if len(reply) > self._max_bytes:
            return self.give_up(account, key, worker)
        held = update(IdempotentReply).where(*_of(account, key), IdempotentReply.worker == worker)
        with self._begin() as session:
            result = session.execute(held.values(reply=reply, finished_at=Clock()))
            if not _changed(result):
                return False
            self._prune(session)
        return True

    def give_up(self, account: str, key: str, worker: str) -> bool:
        """Let others make it: no reply came of it. False where it was no longer the worker's."""
        mine = IdempotentReply.worker == worker, IdempotentReply.finished_at.is_(None)
        with self._begin() as session:
            return _changed(session.execute(delete(IdempotentReply).where(*_of(account, key), *mine)))

    def forget(self, account: str, key: str, finished_at: float) -> None:
        """Delete the reply that was made then: it can no longer be given."""
        with self._begin() as session:
            session.execute(
                delete(IdempotentReply).where(*_of(account, key), IdempotentReply.finished_at == finished_at)
            )

    def _old(self) -> ColumnElement[bool]:
        return IdempotentReply.finished_at < seconds_from_now(-self._life)

    def _prune(self, session: Session) -> None:
        newest = (
            select(IdempotentReply.account, IdempotentReply.key, func.length(IdempotentReply.reply))
            .where(IdempotentReply.finished_at.is_not(None))
            .order_by(IdempotentReply.finished_at.desc())
        )
        session.execute(delete(IdempotentReply).where(self._old()))
        total = 0
        for place, (account, key, size) in enumerate(session.execute(newest).all()):
            total += size
            if place >= self._max or total > self._max_bytes:
                session.execute(delete(IdempotentReply).where(*_of(account, key)))


def _changed(result: Result[Any]) -> bool:
    return bool(result.rowcount)  # type: ignore[attr-defined]


def _of(account: str, key: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return IdempotentReply.account == account, IdempotentReply.key == key
