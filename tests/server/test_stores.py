"""Idempotent replies: within their memory, and forgotten in time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.core.faults import Fault, RequestError
from server.front.idempotency import IdempotencyStore
from tests.server.house import Clock


def test_idempotent_replies_are_forgotten_after_failures_and_with_time() -> None:
    async def scenario() -> None:
        clock = Clock()
        store = IdempotencyStore(None, max_replies=10, max_bytes=1000, life_seconds=5, clock=clock)
        made = 0

        async def make(fail: bool = False) -> dict[str, Any]:
            nonlocal made
            made += 1
            await asyncio.sleep(0)
            if fail:
                raise RequestError(Fault.ENGINE_FAILED, "no")
            return {"made": made}

        with pytest.raises(RequestError):
            await store.run("me", "k", "body", lambda: make(fail=True))
        await asyncio.sleep(0)
        assert await store.run("me", "k", "body", make) == ({"made": 2}, False)
        assert await store.run("me", "k", "body", make) == ({"made": 2}, True)
        assert await store.run("you", "k", "other", make) == ({"made": 3}, False), "keys of two callers never meet"
        with pytest.raises(RequestError) as conflict:
            await store.run("me", "k", "other", make)
        assert conflict.value.fault is Fault.CONFLICT
        clock.now = 6
        assert await store.run("me", "k", "other", make) == ({"made": 4}, False)

    asyncio.run(scenario())


def test_idempotent_replies_stay_within_their_memory() -> None:
    async def scenario() -> None:
        store = IdempotencyStore(None, max_replies=10, max_bytes=100, life_seconds=5, clock=Clock())

        async def replayed(key: str, size: int) -> bool:
            async def make() -> dict[str, Any]:
                return {"data": [{"b64_json": "x" * (size // 2), "url": None}, {"b64_json": "x" * (size // 2)}]}

            return (await store.run("me", key, "body", make))[1]

        assert not await replayed("first", 40) and not await replayed("second", 60)
        assert await replayed("first", 40) and await replayed("second", 60), "just within"
        assert not await replayed("third", 40)
        assert await replayed("second", 60) and await replayed("third", 40)
        assert not await replayed("first", 40), "the oldest left first"
        assert not await replayed("huge", 200) and not await replayed("huge", 200), "larger than the store: not kept"
        assert await replayed("third", 40) and await replayed("first", 40), "and it pushed nothing out"

    asyncio.run(scenario())


async def told(usable: bool) -> bool:
    return usable


def test_an_idempotent_reply_that_can_no_longer_be_given_is_made_anew() -> None:
    async def scenario() -> None:
        store, made = IdempotencyStore(None, max_replies=10, max_bytes=100, life_seconds=5, clock=Clock()), list[int]()

        async def make() -> dict[str, Any]:
            made.append(len(made))
            return {"made": made[-1]}

        for usable, expected in ((True, (0, False)), (True, (0, True)), (False, (1, False)), (True, (1, True))):
            reply, replayed = await store.run("me", "k", "body", make, lambda _reply, usable=usable: told(usable))
            assert (reply["made"], replayed) == expected

    asyncio.run(scenario())


def test_a_reply_that_was_made_anew_is_the_newest() -> None:
    async def scenario() -> None:
        store = IdempotencyStore(None, max_replies=2, max_bytes=100, life_seconds=5, clock=Clock())

        async def make() -> dict[str, Any]:
            return {}

        for key, usable in (("a", True), ("b", True), ("a", False), ("c", True)):
            await store.run("me", key, "body", make, lambda _reply, usable=usable: told(usable))
        assert (await store.run("me", "a", "body", make))[1], "b was the oldest"

    asyncio.run(scenario())
