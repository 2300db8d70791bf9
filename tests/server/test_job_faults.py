"""Video jobs where the database or the store is away, and what becomes of films that are made."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.core.faults import Fault, RequestError
from server.films import runner as runner_module
from server.films import writer as writer_module
from server.films.database import DatabaseError
from server.films.store import Queue
from server.films.tables import VideoJob
from server.front.generation import Advanced, Failed, GenerationSpec
from server.objects.store import StoreError
from tests.server.film_desk import FILM, Desk


def test_a_finished_film_outlasts_a_locked_database(
    desks: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_RETRY_SECONDS", 0.01)
    desk = desks()
    made = desk.accept()
    desk.until(lambda: made.id in desk.maker.taken)
    complete, failures = desk.store.complete, iter([True, True, False])

    def locked(*arguments: Any) -> bool:
        if next(failures):
            raise DatabaseError("it is locked")
        return complete(*arguments)

    monkeypatch.setattr(desk.store, "complete", locked)
    desk.maker.tell(made.id, FILM)
    desk.until_status(made, "completed 100")


@pytest.mark.usefixtures("quick")
def test_requests_do_not_wait_one_by_one_for_a_locked_database(
    desks: Callable[..., Desk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six of them took 3, 6, 9, 12, 15 and 18 s to be refused, and held a thread each."""
    desk, waited = desks(), list[str]()
    add = desk.store.add

    def counted(job: VideoJob, now: float = 0.0) -> VideoJob:
        waited.append(job.id)
        return add(job, now)

    monkeypatch.setattr(desk.store, "add", counted)
    other = sqlite3.connect(tmp_path / "jobs.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(6) as pool:
        refused = [each.exception() for each in [pool.submit(desk.accept) for _ in range(6)]]
    assert [type(each) for each in refused] == [DatabaseError] * 6 and len(waited) <= 1
    with pytest.raises(DatabaseError, match="it is locked") as known:
        desk.accept()
    assert known.value.retry_after and len(waited) <= 1
    other.close()
    desk.database.probe()
    desk.until_status(desk.accept(), "queued 0")


def test_requests_do_not_pile_up_behind_one_that_the_database_does_not_answer(
    desks: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_ADMIT_SECONDS", 0.05)
    desk, asked, answers = desks(), threading.Event(), threading.Event()
    queue = desk.store.queue

    def hanging(models: Collection[str], account: str) -> Queue:
        asked.set()
        answers.wait(20)
        return queue(models, account)

    monkeypatch.setattr(desk.store, "queue", hanging)
    with ThreadPoolExecutor(2) as pool:
        try:
            first = pool.submit(desk.accept)
            assert asked.wait(20)
            assert isinstance(pool.submit(desk.accept).exception(10), DatabaseError)
        finally:
            answers.set()
        desk.until(lambda: first.result().id in desk.maker.taken)


def test_progress_is_written_once_a_second_at_most(desks: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "_PROGRESS_SECONDS", 60.0)
    desk = desks()
    made = desk.accept()
    desk.until(lambda: made.id in desk.maker.taken)
    advance, written = desk.store.advance, list[int]()

    def counted(job_id: str, worker: str, progress: int) -> bool:
        written.append(progress)
        return advance(job_id, worker, progress)

    monkeypatch.setattr(desk.store, "advance", counted)
    for step in range(50):
        desk.maker.tell(made.id, Advanced(step / 50))
    desk.maker.tell(made.id, FILM)
    desk.until_status(made, "completed 100")
    assert written == [0]


def test_a_film_waits_for_a_store_that_is_away_and_its_job_is_held(
    desks: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was reported as failed, and an hour's work thrown away."""
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", 0.01)
    for name, seconds in (("_LEASE_SECONDS", 0.6), ("_TICK_SECONDS", 0.05)):
        monkeypatch.setattr(runner_module, name, seconds)
    desk, tries = desks(together=1), list[float]()
    put = desk.shelf.put

    def away(job_id: str, files: Mapping[str, bytes]) -> None:
        tries.append(time.time())
        raise StoreError("it is full")

    monkeypatch.setattr(desk.shelf, "put", away)
    made = desk.accept()
    desk.until(lambda: made.id in desk.maker.taken)
    desk.maker.tell(made.id, Advanced(0.9))
    desk.maker.tell(made.id, FILM)
    desk.until(lambda: bool(tries) and tries[-1] > tries[0] + 0.8)  # longer than a lease
    waiting = desk.accept()
    free = desk.store.claim(["m"], "other", 0.0)
    assert desk.status(made) == "in_progress 89" and free is not None and free.id == waiting.id
    assert waiting.id not in desk.maker.taken, "no more is made than can be kept"
    monkeypatch.setattr(desk.shelf, "put", put)
    desk.until_status(made, "completed 100")
    assert desk.film(made).read_bytes() == b"film"


def test_what_the_store_does_not_take_goes_back_in_line_when_the_server_stops(
    desks: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = desks()
    made = first.accept()
    first.until(lambda: made.id in first.maker.taken)

    def away(job_id: str, files: Mapping[str, bytes]) -> None:
        raise StoreError("it cannot be reached")

    monkeypatch.setattr(first.shelf, "put", away)
    first.maker.tell(made.id, FILM)
    first.runner.stop()
    second = desks()
    second.until(lambda: made.id in second.maker.taken)


def test_a_film_that_the_store_does_not_let_go_keeps_its_row(
    desks: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row went first, and nothing named the film any more."""
    desk = desks()
    made = desk.accept()
    desk.until(lambda: made.id in desk.maker.taken)
    desk.maker.tell(made.id, FILM)
    desk.until_status(made, "completed 100")

    def away(job_id: str) -> None:
        raise StoreError("it cannot be reached")

    with monkeypatch.context() as broken:
        broken.setattr(desk.shelf, "remove", away)
        with pytest.raises(StoreError):
            desk.runner.remove(made)
        assert desk.status(made) == "completed 100"
    desk.runner.remove(made)
    assert desk.status(made) == "gone" and not desk.film(made).exists()


def test_what_the_machine_lacks_puts_a_film_back_in_line(
    desks: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_TICK_SECONDS", 0.05)
    desk = desks()
    made = desk.accept()
    for _ in range(4):  # however often: it is not the film's fault
        desk.until(lambda: made.id in desk.maker.taken)
        generation_sink = desk.maker.taken.pop(made.id)[1]
        generation_sink(Advanced(0.5))
        generation_sink(Failed(RequestError(Fault.LACKING, "too few descriptors")))
    desk.until(lambda: made.id in desk.maker.taken)
    desk.maker.tell(made.id, FILM)
    desk.until_status(made, "completed 100")


def test_a_database_that_was_away_longer_than_a_lease_costs_no_film(
    desks: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("_LEASE_SECONDS", 1.5), ("_TICK_SECONDS", 0.05), ("_RETRY_SECONDS", 0.05)):
        monkeypatch.setattr(runner_module, name, seconds)
    desk = desks(together=8)
    running = desk.accept()
    desk.until(lambda: running.id in desk.maker.taken)
    desk.maker.tell(running.id, Advanced(0.5))
    desk.until_status(running, "in_progress 49")
    attempts: list[float] = []

    def away(*_: Any) -> Any:
        attempts.append(time.time())
        raise DatabaseError("it cannot be reached")

    with monkeypatch.context() as broken:
        broken.setattr(desk.store, "claim", away)
        broken.setattr(desk.store, "renew", away)
        back = time.time() + 1.8  # longer than the lease
        desk.until(lambda: bool(attempts) and attempts[-1] > back)
    tidied = time.time()
    desk.until(lambda: time.time() > tidied + 0.5)  # many ticks
    assert desk.maker.cancelled == [] and desk.status(running) == "in_progress 49"


def test_a_stored_request_that_nobody_can_read_is_reported(desks: Callable[..., Desk]) -> None:
    desk = desks()

    def unreadable(request: Mapping[str, Any]) -> GenerationSpec:
        raise ValueError("a field of another version of the server")

    desk.runner._maker = replace(desk.runner._maker, prepare=unreadable)
    odd = desk.accept()
    desk.until_status(odd, "failed 0 engine_failed")


def test_the_oldest_films_leave_when_there_are_too_many(desks: Callable[..., Desk]) -> None:
    desk = desks(bytes=40, together=3)  # a film and its pictures have 18 bytes
    ordered = [desk.accept() for _ in range(3)]
    desk.until(lambda: len(desk.maker.taken) == 3)
    made = ordered[::-1]  # the last one ordered is finished first
    for one in made:
        desk.maker.tell(one.id, FILM)
        desk.until_status(one, "completed 100")
    desk.until(lambda: not desk.film(made[0]).exists())
    assert all(desk.film(one).exists() for one in made[1:])
    assert desk.store.get("", made[0].id, time.time()) is None
    assert {one.id for one in desk.store.page("", None, 9, True, time.time()).jobs} == {one.id for one in made[1:]}


def test_a_film_that_was_ready_when_it_was_cancelled_does_not_stay(desks: Callable[..., Desk]) -> None:
    desk = desks()
    made = desk.accept()
    desk.until(lambda: made.id in desk.maker.taken)
    assert desk.store.cancel(made.id, time.time(), time.time() + 60)
    desk.maker.tell(made.id, FILM)
    desk.until(lambda: not desk.runner._running)
    desk.until(lambda: not desk.film(made).exists())
    assert desk.status(made) == "failed 0 cancelled"


def test_a_finished_job_is_forgotten_with_its_film(desks: Callable[..., Desk]) -> None:
    desk = desks()
    made = desk.accept()
    desk.until(lambda: made.id in desk.maker.taken)
    desk.maker.tell(made.id, FILM)
    desk.until_status(made, "completed 100")
    desk.runner.remove(made)
    assert desk.status(made) == "gone" and not desk.film(made).exists()
