"""``Idempotency-Key``: the same key and body get the same reply, stored or still being made.

A keyed request runs on after its client has gone: that is what the key is for, since the retry then finds the reply.
Only successful replies are kept; after an error the same key may try again.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from server.core.faults import Fault, RequestError

Reply = dict[str, Any]


@dataclass
class _Kept:
    body_digest: bytes
    task: asyncio.Task[Reply]
    since: float
    size: int = 0  # bytes of the reply's pictures; 0 while they are being made


class IdempotencyStore:
    """Replies by key, bounded in number, bytes and time. Lives on one event loop.

    Args:
        max_replies: the oldest finished reply is forgotten beyond this.
        max_bytes: likewise, for the base64 of their pictures; a reply larger than this is not kept at all.
        life_seconds: how long a reply is kept.
    """

    def __init__(
        self, max_replies: int, max_bytes: int, life_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max = max_replies
        self._max_bytes = max_bytes
        self._life = life_seconds
        self._clock = clock
        self._kept: OrderedDict[tuple[bytes, str], _Kept] = OrderedDict()

    async def run(
        self,
        owner: bytes,
        key: str,
        body_digest: bytes,
        make: Callable[[], Awaitable[Reply]],
        usable: Callable[[Reply], Awaitable[bool]] | None = None,
    ) -> tuple[Reply, bool]:
        """Return the reply for ``key`` and whether it was made for an earlier request.

        Args:
            owner: digest of the caller's API key: keys of different callers never meet.
            key: the header's value.
            body_digest: digest of the request's body.
            make: makes the reply; runs at most once at a time a key.
            usable: whether a stored reply can still be given; one that cannot is made anew.

        Raises:
            RequestError: 409 where the key was used with another body; whatever ``make`` raises.
        """
        self._prune()
        slot = (owner, key)
        kept = self._kept.get(slot)
        if kept is not None and kept.body_digest != body_digest:
            raise RequestError(
                Fault.CONFLICT,
                "This Idempotency-Key was used with another body; use a new key for a new request.",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        if kept is not None and usable is not None and kept.task.done() and not await usable(kept.task.result()):
            newest = self._kept.get(slot)  # somebody else may have found the same, and be making it anew
            kept = None if newest is kept else newest
        replayed = kept is not None
        if kept is None:
            kept = _Kept(body_digest, asyncio.ensure_future(_as_coroutine(make)), self._clock())
            self._kept.pop(slot, None)  # one that is made anew is the newest, and goes last
            self._kept[slot] = kept
            kept.task.add_done_callback(lambda task: self._finished(slot, task))
        # shield: a client that leaves must not cancel the work that its retry will ask for
        return await asyncio.shield(kept.task), replayed

    def _finished(self, slot: tuple[bytes, str], task: asyncio.Task[Reply]) -> None:
        failed = task.cancelled() or task.exception() is not None
        kept = self._kept.get(slot)
        if kept is None or kept.task is not task:
            return
        if failed:
            del self._kept[slot]
            return
        kept.size = sum(len(picture.get("b64_json") or "") for picture in task.result().get("data", ()))
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


async def _as_coroutine(make: Callable[[], Awaitable[Reply]]) -> Reply:
    return await make()
