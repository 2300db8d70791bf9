"""``Idempotency-Key``: the same key and body get the same reply, stored or still being made.

A keyed request runs on after its client has gone: that is what the key is for, since the retry then finds the reply.
Only successful replies are kept; after an error the same key may try again. What was made here lately is given from
memory; the database says what other servers, and this one before a restart, have made or are making. No reply is given
before the database has it: one that others do not know of would be followed by another, different one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from server.core.faults import Fault, RequestError
from server.films.database import DatabaseError
from server.films.replies import ReplyStore

_LEASE_SECONDS = 15.0
_POLL_SECONDS = 0.5

Reply = dict[str, Any]


@dataclass
class _Kept:
    body_digest: str
    task: asyncio.Task[tuple[Reply, bool]]
    since: float
    size: int = 0  # bytes of the reply's pictures; 0 while they are being made


class IdempotencyStore:
    """Replies by key, bounded in number, bytes and time. Lives on one event loop.

    Args:
        records: what all servers of one database know; None: nothing but this one's memory.
        max_replies: the oldest finished reply is forgotten beyond this.
        max_bytes: likewise, for the base64 of their pictures; a reply larger than this is not kept at all.
        life_seconds: how long a reply is kept.
    """

    def __init__(
        self,
        records: ReplyStore | None,
        max_replies: int,
        max_bytes: int,
        life_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._records = records
        self._worker = uuid.uuid4().hex
        self._max = max_replies
        self._max_bytes = max_bytes
        self._life = life_seconds
        self._clock = clock
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()

    async def run(
        self,
        account: str,
        key: str,
        body_digest: str,
        make: Callable[[], Awaitable[Reply]],
        usable: Callable[[Reply], Awaitable[bool]] | None = None,
    ) -> tuple[Reply, bool]:
        """Return the reply for ``key`` and whether it was made for an earlier request.

        Args:
            account: the caller's: keys of different callers never meet.
            key: the header's value.
            body_digest: digest of the request's body.
            make: makes the reply; runs at most once at a time a key.
            usable: whether a stored reply can still be given; one that cannot is made anew.

        Raises:
            RequestError: 409 where the key was used with another body; 503 where the database does not say, or does not
                take the reply; whatever ``make`` raises.
        """
        self._prune()
        slot = (account, key)
        kept = self._kept.get(slot)
        if kept is not None and kept.body_digest != body_digest:
            raise key_reused()
        if kept is not None and usable is not None and kept.task.done() and not await usable(kept.task.result()[0]):
            newest = self._kept.get(slot)  # somebody else may have found the same, and be making it anew
            kept = None if newest is kept else newest
        joined = kept is not None
        if kept is None:
            kept = _Kept(
                body_digest, asyncio.ensure_future(self._obtain(slot, body_digest, make, usable)), self._clock()
            )
            self._kept.pop(slot, None)  # one that is made anew is the newest, and goes last
            self._kept[slot] = kept
            kept.task.add_done_callback(lambda task: self._finished(slot, task))
        # shield: a client that leaves must not cancel the work that its retry will ask for
        reply, replayed = await asyncio.shield(kept.task)
        return reply, joined or replayed

    async def _obtain(
        self,
        slot: tuple[str, str],
        body_digest: str,
        make: Callable[[], Awaitable[Reply]],
        usable: Callable[[Reply], Awaitable[bool]] | None,
    ) -> tuple[Reply, bool]:
        """Read the reply from the records, wait for who makes it, or make it."""
        records = self._records
        if records is None:
            return await make(), False
        made: Reply | None = None
        while True:
            found = await asyncio.to_thread(records.claim, *slot, body_digest, self._worker, _LEASE_SECONDS)
            if found.mine:
                holding = asyncio.ensure_future(self._hold(records, slot))
                try:
                    made = await make() if made is None else made
                    if await self._record(records, slot, made):
                        return made, False
                except BaseException:
                    with contextlib.suppress(DatabaseError):  # then its lease lapses
                        await asyncio.to_thread(records.give_up, *slot, self._worker)
                    raise
                finally:
                    holding.cancel()
                continue  # the lease had lapsed, as of a server that was stopped: what another made meanwhile counts
            if found.body_digest != body_digest:
                raise key_reused()
            if found.reply is None or found.finished_at is None:
                await asyncio.sleep(_POLL_SECONDS)
                continue
            reply = msgspec.json.decode(found.reply, type=Reply)
            if usable is None or await usable(reply):
                return reply, True
            await asyncio.to_thread(records.forget, *slot, found.finished_at)

    async def _record(self, records: ReplyStore, slot: tuple[str, str], made: Reply) -> bool:
        """Have the database keep what was made; False where it is no longer this server's to say.

        Raises:
            DatabaseError: the database was away for as long as a lease is.
        """
        reply = msgspec.json.encode(made)
        end = time.monotonic() + _LEASE_SECONDS
        while True:
            try:
                return await asyncio.to_thread(records.finish, *slot, self._worker, reply)
            except DatabaseError:
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(_POLL_SECONDS)

    async def _hold(self, records: ReplyStore, slot: tuple[str, str]) -> None:
        while True:
            await asyncio.sleep(_LEASE_SECONDS / 3)
            with contextlib.suppress(DatabaseError):
                await asyncio.to_thread(records.renew, *slot, self._worker, _LEASE_SECONDS)

    def _finished(self, slot: tuple[str, str], task: asyncio.Task[tuple[Reply, bool]]) -> None:
        failed = task.cancelled() or task.exception() is not None
        kept = self._kept.get(slot)
        if kept is None or kept.task is not task:
            return
        if failed:
            del self._kept[slot]
            return
        kept.size = sum(len(picture.get("b64_json") or "") for picture in task.result()[0].get("data", ()))
        if kept.size > self._max_bytes:
            del self._kept[slot]
        self._prune()

    def _prune(self) -> None:
        now = self._clock()
        done = [(slot, kept) for slot, kept in self._kept.items() if kept.task.done()]
        surplus = len(self._kept) - self._max
        surplus_bytes = sum(kept.size for _, kept in done) - self._max_bytes
        for slot, kept in done:
            if now - kept.since > self._life or surplus > 0 or surplus_bytes > 0:
                del self._kept[slot]
                surplus -= 1
                surplus_bytes -= kept.size


def key_reused() -> RequestError:
    """Return the 409 for a key that came with another body before."""
    return RequestError(
        Fault.CONFLICT,
        "This Idempotency-Key was used with another body; use a new key for a new request.",
        param="Idempotency-Key",
        code="idempotency_key_reused",
    )
