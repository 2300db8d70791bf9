"""Replies to requests with an ``Idempotency-Key`` that several servers of one database make and give."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from server.core.faults import Fault, RequestError
from server.films.database import Database
from server.films.replies import ReplyStore
from server.films.tables import IdempotentReply, seconds_from_now
from server.front.idempotency import IdempotencyStore

Server = Callable[[], IdempotencyStore]


@pytest.fixture
def new_server(open_database: Callable[[], Database]) -> Server:
    def server() -> IdempotencyStore:
        bounds = {"max_replies": 3, "max_bytes": 300, "life_seconds": 60.0}
        return IdempotencyStore(ReplyStore(open_database(), **bounds), **bounds)

    return server


async def answer(server: IdempotencyStore, key: str, text: str, body: str = "b") -> tuple[dict[str, Any], bool]:
    async def make() -> dict[str, Any]:
        return {"data": [{"b64_json": text}]}

    return await server.run("me", key, body, make)


def test_a_reply_outlasts_its_server_and_is_given_by_others(new_server: Server) -> None:
    async def scenario() -> None:
        first = await answer(new_server(), "k", "one")
        other = new_server()
        assert first[1] is False and await answer(other, "k", "two") == (first[0], True)
        with pytest.raises(RequestError) as conflict:
            await answer(new_server(), "k", "two", body="another")
        assert conflict.value.fault is Fault.CONFLICT

    asyncio.run(scenario())


def test_two_servers_make_a_reply_once(new_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.front.idempotency._POLL_SECONDS", 0.01)

    async def scenario() -> None:
        made = Counter[str]()

        async def make() -> dict[str, Any]:
            made["x"] += 1
            await asyncio.sleep(0.05)
            return {"made": made["x"]}

        replies = await asyncio.gather(*(new_server().run("me", "k", "b", make) for _ in range(2)))
        assert made["x"] == 1 and sorted(replayed for _, replayed in replies) == [False, True]

    asyncio.run(scenario())


def test_what_a_killed_server_made_is_made_again(open_database: Callable[[], Database], new_server: Server) -> None:
    database = open_database()
    records = ReplyStore(database, 3, 300, 60.0)
    assert records.claim("me", "k", "b", "killed", 600).mine
    assert not records.claim("me", "k", "b", "other", 600).mine, "it may still be at work"
    with database.begin() as session:
        session.execute(update(IdempotentReply).values(lease_until=seconds_from_now(-0.001)))
    assert asyncio.run(answer(new_server(), "k", "two")) == ({"data": [{"b64_json": "two"}]}, False)
    records.give_up("me", "k", "killed")
    assert records.claim("me", "k", "b", "other", 1).reply is not None, "what is not its own it cannot take back"


def test_replies_of_all_servers_are_bounded_in_number_bytes_and_time(open_database: Callable[[], Database]) -> None:
    database = open_database()

    def kept(records: ReplyStore, *keys: str) -> list[bool]:
        return [records.claim("me", key, "b", "looking", -1).reply is not None for key in keys]

    few = ReplyStore(database, max_replies=3, max_bytes=300, life_seconds=60.0)

    def make(key: str, size: int) -> None:
        assert few.claim("me", key, "b", "w", 60).mine
        few.finish("me", key, "w", bytes(size))

    for key in "abcd":
        make(key, 10)
    assert kept(few, *"abcd") == [False, True, True, True], "the oldest leaves first"
    make("e", 285)
    assert kept(few, *"cde") == [False, True, True]
    make("f", 301)
    assert kept(few, *"def") == [True, True, False], "too large to be kept, and pushes nothing out"
    assert kept(ReplyStore(database, 3, 300, life_seconds=0.0), *"de") == [False, False]


# -- what may go wrong between a drawing and its record ----------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.front.idempotency._LEASE_SECONDS", 0.1)
    monkeypatch.setattr("server.front.idempotency._POLL_SECONDS", 0.01)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("still_at_work", [False, True])
def test_a_server_that_was_stopped_while_it_drew_gives_what_another_drew(
    new_server: Server, still_at_work: bool
) -> None:
    """Both gave their own drawing, for as long as they lived."""
    stopped, other = new_server(), new_server()
    begun, pool = threading.Event(), ThreadPoolExecutor(1)
    others: list[Future[tuple[dict[str, Any], bool]]] = []

    async def draw_at_other() -> dict[str, Any]:
        begun.set()
        await asyncio.sleep(0.2 if still_at_work else 0)
        return {"made": "by the other"}

    async def draw_while_stopped() -> dict[str, Any]:
        begun.wait(0.15)  # nothing of this server goes on, as after SIGSTOP: its lease lapses
        others.append(pool.submit(asyncio.run, other.run("me", "k", "b", draw_at_other)))
        assert begun.wait(20)
        if not still_at_work:
            others[0].result(20)
        return {"made": "by the one that was stopped"}

    async def again(server: IdempotencyStore) -> dict[str, Any]:
        return (await answer(server, "k", "drawn once more"))[0]

    async def scenario() -> list[dict[str, Any]]:
        first, _ = await stopped.run("me", "k", "b", draw_while_stopped)
        return [first, await again(stopped)]

    replies = asyncio.run(scenario())
    replies += [others[0].result(20)[0], asyncio.run(again(new_server()))]
    assert all(reply == replies[0] for reply in replies), replies


@pytest.mark.usefixtures("short", "quick")
@pytest.mark.parametrize("comes_back", [False, True])
def test_a_reply_that_cannot_be_recorded_is_not_given(
    tmp_path: Path, comes_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was, and the next server drew another under the same key."""
    if comes_back:
        monkeypatch.setattr("server.front.idempotency._LEASE_SECONDS", 2.0)
    file = tmp_path / "jobs.sqlite3"
    bounds = {"max_replies": 3, "max_bytes": 300, "life_seconds": 60.0}
    databases = [Database(f"sqlite:///{file}") for _ in range(2)]
    first, other = [IdempotencyStore(ReplyStore(each, **bounds), **bounds) for each in databases]
    blocker = sqlite3.connect(file, isolation_level=None, check_same_thread=False)

    def unlock() -> None:
        while databases[0].fault is None:
            time.sleep(0.01)
        blocker.execute("ROLLBACK")

    async def draw() -> dict[str, Any]:
        blocker.execute("BEGIN IMMEDIATE")
        if comes_back:
            threading.Thread(target=unlock).start()
        return {"made": "first"}

    async def scenario() -> None:
        if comes_back:
            assert await first.run("me", "k", "b", draw) == ({"made": "first"}, False)
        else:
            with pytest.raises(RequestError) as unrecorded:
                await first.run("me", "k", "b", draw)
            assert unrecorded.value.code == "database_unavailable" and unrecorded.value.retry_after
            blocker.execute("ROLLBACK")
            databases[0].probe()
        replies = [(await answer(server, "k", "second"))[0] for server in (other, first, other)]
        assert replies[0] == replies[1] == replies[2]
        assert (replies[0] == {"made": "first"}) == comes_back

    try:
        asyncio.run(scenario())
    finally:
        blocker.close()
        for each in databases:
            each.close()
