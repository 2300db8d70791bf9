"""Leases go by the database's clock: whatever a server's own says, it takes nothing that is held, and all that is free.

Each test is of two servers at one database; the clock of one of them is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest

from server.films.database import Database
from server.films.replies import ReplyStore
from server.films.store import JobStore
from tests.server.film_desk import LATER, job

HOUR = 3600.0
REPLY = b"{}"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


@contextmanager
def off(by: float) -> Iterator[None]:
    """As on a machine whose clock goes wrong by so many seconds; the database is on another one."""
    right = time.time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: right() + by)
        yield


WRONG = [(first, second) for first, second in product((-HOUR, 0.0, HOUR), repeat=2) if first != second]


@pytest.mark.parametrize(("holders", "others"), WRONG)
def test_a_job_is_held_and_free_by_the_database_s_clock(database: Database, holders: float, others: float) -> None:
    store = JobStore(database)
    added = store.add(job())
    with off(holders):
        assert store.claim(["m"], "holder", 60) and store.advance(added.id, "holder", 10)
        assert store.renew(added.id, "holder", 60)
    with off(others):
        assert store.claim(["m"], "other", 60) is None and store.line(["m"]).waiting == 0
        assert store.give_up_waiting(LATER, life=1.0) == [], "somebody is at it"
        held = store.get("", added.id)
        assert held is not None and not held.left
    with off(holders):
        assert store.renew(added.id, "holder", -1)
    with off(others):
        assert store.line(["m"]).waiting == 1
        lapsed = store.get("", added.id)
        assert lapsed is not None and lapsed.left
        assert store.claim(["m"], "other", -1)
        assert [one.id for one in store.give_up_waiting(LATER, life=1.0)] == [added.id]


@pytest.mark.parametrize(("holders", "others"), WRONG)
def test_a_reply_is_held_kept_and_forgotten_by_the_database_s_clock(
    database: Database, holders: float, others: float
) -> None:
    store = ReplyStore(database, max_replies=3, max_bytes=300, life_seconds=600.0)
    with off(holders):
        assert store.claim("me", "k", "b", "holder", 60).mine
    with off(others):
        assert not store.claim("me", "k", "b", "other", 60).mine, "it is being made"
    with off(holders):
        store.renew("me", "k", "holder", 60)
    with off(others):
        assert not store.claim("me", "k", "b", "other", 60).mine, "it still is"
    with off(holders):
        store.renew("me", "k", "holder", -1)
    with off(others):
        assert store.claim("me", "k", "b", "other", 60).mine, "its holder is gone"
        store.finish("me", "k", "other", REPLY)
    with off(holders):
        assert store.claim("me", "k", "b", "holder", 60).reply == REPLY, "it is as old as the database says"
    aged = ReplyStore(database, max_replies=3, max_bytes=300, life_seconds=-1.0)
    with off(others):
        assert aged.claim("me", "k", "b", "other", 60).mine, "its life is over"
