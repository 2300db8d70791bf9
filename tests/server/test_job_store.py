"""Video jobs in the database: claims, leases, and what is kept how long."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from server.films.database import Database
from server.films.store import JobStore
from server.films.tables import VideoJob
from tests.server.film_desk import LATER, NOW, job


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database)


def test_the_oldest_job_is_claimed_first_and_by_one_worker_only(store: JobStore) -> None:
    first, second = store.add(job()), store.add(job())
    store.add(job(model="another"))
    claimed = [store.claim(["m"], worker, 60) for worker in ("a", "b", "c")]
    assert [found and found.id for found in claimed] == [first.id, second.id, None]


def test_accounts_are_served_in_turn_however_much_each_has_sent(store: JobStore) -> None:
    """One key's films stood in front of everybody's until all of them were made."""

    def send(account: str) -> VideoJob:
        sent = job(account=account)
        sent.turn = store.queue(["m"], account).turn
        return store.add(sent)

    def make() -> str:
        taken = store.claim(["m"], "w", 60)
        assert taken is not None and store.complete(taken.id, "w", NOW, LATER, 1, {})
        return taken.account

    for account in "aaaaaabbc":
        send(account)
    assert [make() for _ in range(5)] == list("abcab")
    send("d")
    send("b")
    assert [make() for _ in range(6)] == list("adbaaa"), "who was served does not wait for it; nobody saves turns up"
    assert store.claim(["m"], "w", 60) is None and store.queue(["m"], "a").all == 0


def test_a_lapsed_lease_is_anybodys_and_its_holder_can_change_nothing_more(store: JobStore) -> None:
    added = store.add(job())
    assert store.claim(["m"], "a", 60)
    assert store.advance(added.id, "a", 40)
    assert store.claim(["m"], "b", 60) is None
    assert store.renew(added.id, "a", 0)
    again = store.claim(["m"], "b", 60)
    assert again and again.id == added.id and again.attempts == 1
    found = store.get("", added.id)
    assert found and (found.status, found.progress) == ("queued", 0)
    assert not store.renew(added.id, "a", 60)
    assert not store.advance(added.id, "a", 50)
    assert not store.complete(added.id, "a", LATER, LATER + 60, 1, {})
    assert store.complete(added.id, "b", LATER, LATER + 60, 1, {"schedule": "2+2"})
    assert not store.fail(added.id, "b", LATER, LATER + 60, "x", "y")  # it is finished
    found = store.get("", added.id)
    assert found and (found.status, found.progress, found.report) == ("completed", 100, {"schedule": "2+2"})


def test_only_a_begun_job_whose_worker_did_not_give_it_back_was_attempted(store: JobStore) -> None:
    added = store.add(job())

    def attempts() -> int:
        found = store.get("", added.id)
        assert found is not None
        return found.attempts

    assert store.claim(["m"], "a", 60) and store.release(added.id, "a")
    assert attempts() == 0
    assert store.claim(["m"], "a", 60) and store.advance(added.id, "a", 0) and store.advance(added.id, "a", 30)
    assert attempts() == 1
    assert store.release(added.id, "a") and attempts() == 0
    assert store.claim(["m"], "a", 60) and store.advance(added.id, "a", 0)
    assert store.release(added.id, "a", counts=True) and attempts() == 1


def test_ended_jobs_without_films_are_bounded(store: JobStore) -> None:
    ended = [store.add(job()) for _ in range(5)]
    waiting = store.add(job())
    for one in ended:
        assert store.cancel(one.id, NOW, LATER)
    store.forget_surplus(2)
    assert [store.get("", one.id) is None for one in ended] == [True, True, True, False, False]
    assert store.get("", waiting.id) is not None


def test_cancelling_comes_before_finishing_or_not_at_all(store: JobStore) -> None:
    added = store.add(job())
    store.claim(["m"], "a", 60)
    assert store.cancel(added.id, NOW, LATER)
    assert not store.complete(added.id, "a", NOW, LATER, 1, {})
    assert not store.cancel(added.id, NOW, LATER)
    found = store.get("", added.id)
    assert found and (found.status, found.error_code) == ("failed", "cancelled")


def test_what_nobody_takes_is_reported_and_what_has_expired_is_forgotten(store: JobStore) -> None:
    old, fresh = store.add(job("gone", created_at=NOW - 100)), store.add(job("gone"))
    assert [one.id for one in store.give_up_waiting(NOW, 60)] == [old.id]
    found = store.get("", old.id)
    assert found and (found.status, found.error_code) == ("failed", "deadline_exceeded")
    store.forget_expired(LATER)
    assert store.get("", old.id) is None
    waiting = store.get("", fresh.id)
    assert waiting and waiting.status == "queued"


def test_a_job_may_wait_as_long_as_the_server_said_that_took_it(store: JobStore) -> None:
    """Whoever tidies up, and however long its own may wait."""
    short, long = job(), job()
    short.begin_by, long.begin_by = NOW + 10, NOW + 1000
    store.add(short)
    store.add(long)
    assert [one.id for one in store.give_up_waiting(NOW + 50, life=1.0)] == [short.id]
