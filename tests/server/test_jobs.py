"""Video jobs as they run: together, in line, cancelled, given up and taken again."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from server.core.faults import Fault, RequestError
from server.films.database import Database
from server.films.store import JobStore
from server.films.tables import VideoJob
from server.front.generation import Advanced, Failed
from tests.server.film_desk import FILM, Desk, job


def test_jobs_run_together_up_to_the_bound_and_the_rest_stay_in_line(desks: Callable[..., Desk]) -> None:
    desk = desks(together=2)
    jobs = [desk.accept() for _ in range(3)]
    desk.until(lambda: len(desk.maker.taken) == 2)
    assert desk.status(jobs[0]) == "queued 0"  # nothing has begun
    desk.maker.tell(jobs[0].id, Advanced(0.0))
    desk.until_status(jobs[0], "in_progress 0")
    desk.maker.tell(jobs[0].id, Advanced(0.5))
    desk.until_status(jobs[0], "in_progress 49")
    assert jobs[2].id not in desk.maker.taken
    desk.maker.tell(jobs[0].id, FILM)
    desk.until_status(jobs[0], "completed 100")
    desk.until(lambda: jobs[2].id in desk.maker.taken)


def test_a_crowd_that_finds_the_line_full_is_told_times_at_which_there_is_room_for_each(
    desks: Callable[..., Desk],
) -> None:
    """All were told one time."""
    desk = desks(queue=4)
    for _ in range(4):
        desk.accept()
    told = [desk.refused().retry_after for _ in range(20)]
    assert told == sorted(set(told)) and told[0] == 2 and 20 <= (told[-1] or 0) <= 24, (
        "a film a second, and some caution"
    )


def test_one_key_may_not_fill_the_line(desks: Callable[..., Desk]) -> None:
    """64 films of one key: all others got 429."""
    desk = desks(queue=4, share=0.75)
    for _ in range(3):
        desk.accept("greedy")
    error = desk.refused("greedy")
    assert error.code == "key_share_used" and "has 3 films in line, and may have 3" in error.message
    desk.accept("modest")
    assert desk.refused("modest").code == "queue_full"


def test_a_full_scheduler_leaves_jobs_in_line_and_a_hopeless_request_fails(desks: Callable[..., Desk]) -> None:
    desk = desks()
    desk.maker.refusal = RequestError(Fault.QUEUE_FULL, "full")
    waiting = desk.accept()
    time.sleep(0.2)
    assert desk.status(waiting) == "queued 0"
    desk.maker.refusal = RequestError(Fault.NOT_FOUND, "no such model", code="model_not_found")
    hopeless = desk.accept()
    desk.until_status(hopeless, "failed 0 model_not_found")
    assert desk.status(waiting) == "failed 0 model_not_found"


def test_a_job_cancelled_at_another_server_is_dropped_at_its_next_step(desks: Callable[..., Desk]) -> None:
    mine = desks()
    running = mine.accept()
    mine.until(lambda: running.id in mine.maker.taken)
    other = desks()
    found = other.store.get("", running.id)
    assert found is not None
    other.runner.remove(found)
    mine.maker.tell(running.id, Advanced(0.3))
    mine.until(lambda: mine.maker.cancelled == [running.id])
    assert mine.status(running) == "failed 0 cancelled"


def test_a_draining_server_takes_no_more_films(desks: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event claimed a job and gave it back, which another server could have had meanwhile."""
    monkeypatch.setattr("server.films.runner._PROGRESS_SECONDS", 0.0)  # it counts in every round, and does so last
    claimed: list[str] = []
    rounds: list[int] = []

    class Watched(JobStore):
        def claim(self, models: Collection[str], worker: str, seconds: float) -> VideoJob | None:
            found = super().claim(models, worker, seconds)
            claimed.extend([found.id] if found else [])
            return found

        def counts(self, models: Collection[str]) -> dict[str, int]:
            rounds.append(len(rounds))
            return super().counts(models)

    desk = desks(store=Watched)
    desk.maker.refusal = RequestError(Fault.DRAINING, "stopping")
    jobs = []
    for _ in range(4):
        before = len(rounds)
        jobs.append(desk.accept())
        desk.until(lambda seen=before: len(rounds) > seen + 1)
    assert claimed == [jobs[0].id] and {desk.status(each) for each in jobs} == {"queued 0"}
    other = desks()
    other.until(lambda: len(other.maker.taken) == 2)


def test_what_a_stopping_executor_gives_up_is_taken_by_the_next_server(desks: Callable[..., Desk]) -> None:
    first = desks()
    running = first.accept()
    first.until(lambda: running.id in first.maker.taken)
    first.maker.tell(running.id, Advanced(0.5))
    first.until_status(running, "in_progress 49")
    first.maker.refusal = RequestError(Fault.DRAINING, "stopping")
    first.maker.tell(running.id, Failed(RequestError(Fault.DRAINING, "The server is stopping.")))
    first.until_status(running, "queued 0")
    first.runner.stop()
    second = desks()
    second.until(lambda: running.id in second.maker.taken)


def test_a_job_that_takes_its_server_down_each_time_is_reported(desks: Callable[..., Desk], tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'jobs.sqlite3'}")
    store = JobStore(database)
    deadly = store.add(job(created_at=time.time()))
    for life in range(3):  # each dies with its lease
        assert store.claim(["m"], f"worker {life}", 0)
        assert store.advance(deadly.id, f"worker {life}", 10)
    database.close()
    desk = desks()
    desk.until_status(deadly, "failed 0 engine_failed")
    assert not desk.maker.taken


def test_a_job_that_may_have_broken_the_device_is_counted_and_tried_again_alone(desks: Callable[..., Desk]) -> None:
    desk = desks(together=3)
    jobs = [desk.accept() for _ in range(3)]
    desk.until(lambda: len(desk.maker.taken) == 3)
    desk.maker.tell(jobs[1].id, Advanced(0.2))
    desk.until_status(jobs[1], "in_progress 19")
    desk.maker.taken.clear()
    broken = Failed(RequestError(Fault.NOT_READY, "The server is stopping."))
    for one in (jobs[1], jobs[0]):
        desk.runner._events.put((one.id, broken))
    desk.until(lambda: jobs[0].id in desk.maker.taken)
    found = desk.store.get("", jobs[1].id)
    assert found and found.attempts == 1 and jobs[1].id not in desk.maker.taken  # others run
    for one in (jobs[0], jobs[2]):
        desk.runner._events.put((one.id, FILM))
    desk.until(lambda: jobs[1].id in desk.maker.taken)
    later = desk.accept()
    time.sleep(0.2)
    assert later.id not in desk.maker.taken  # no company for the suspect
    desk.maker.tell(jobs[1].id, FILM)
    desk.until(lambda: later.id in desk.maker.taken)
