"""Video jobs without a network: leases, races, and what is kept how long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rmd.backbones.tiny import tiny_cascades
from server.core.admission import Admission
from server.core.faults import Fault, RequestError
from server.core.work import PictureRecord, Work
from server.films import runner as runner_module
from server.films import writer as writer_module
from server.films.database import Database, DatabaseError
from server.films.maker import FilmMaker, JobLimits
from server.films.runner import JobRunner
from server.films.shelf import FilmShelf
from server.films.store import JobStore
from server.films.tables import VideoJob
from server.front.generation import Advanced, Event, Failed, FinishedPicture, Generation, GenerationSpec
from server.objects.store import Objects, StoreError

NOW = 1000.0
LATER = NOW + 60


def job(model: str = "m", account: str = "", created_at: float = NOW) -> VideoJob:
    request = {"prompt": "a red rocket"}
    return VideoJob(account=account, model=model, request=request, seconds="1", size="32x32", created_at=created_at)


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


class Maker:
    """Takes specs and finishes them when the test says so."""

    def __init__(self) -> None:
        self.taken: dict[str, tuple[Generation, Callable[[Event], None]]] = {}
        self.cancelled: list[str] = []
        self.refusal: RequestError | None = None
        self.admission = Admission(64, 10**9)

    def prepare(self, request: Mapping[str, Any]) -> GenerationSpec:
        cascade = tiny_cascades("wan-1.3b")["3+3"]
        return GenerationSpec(request["prompt"], "3+3", cascade, "student", (1,), frames_per_second=16)

    def submit(self, spec: GenerationSpec, sink: Callable[[Event], None], job_id: str) -> Generation:
        if self.refusal is not None:
            raise self.refusal
        work = Work(id=job_id, prompt=spec.prompt, schedule=spec.schedule, seeds=spec.seeds, frames_per_second=16)
        generation = Generation(spec, work, self.admission.acquire(1, 1), sink, (1.0,))
        self.taken[job_id] = (generation, sink)
        return generation

    def cancel(self, generation: Generation, error: RequestError) -> None:
        self.cancelled.append(generation.id)

    def tell(self, job_id: str, event: Event) -> None:
        self.taken[job_id][1](event)


FILM = FinishedPicture(0, b"film", PictureRecord(), thumbnail=b"thumbnail", spritesheet=b"sheet")


class Desk:
    """A runner over a maker that only does what it is told."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.maker = Maker()
        self.database = Database(f"sqlite:///{folder / 'jobs.sqlite3'}")
        self.store = JobStore(self.database)
        self.films = folder / "films"
        self.shelf = FilmShelf(Objects(self.films))
        maker = FilmMaker(
            self.maker.prepare, self.maker.submit, self.maker.cancel, lambda generation, film: {"schedule": "3+3"}
        )
        bounds = JobLimits(**{"queue": 8, "together": 2, "seconds": 3600.0, "bytes": 10**6, **limits})
        self.runner = JobRunner(self.store, self.shelf, maker, ["m"], bounds)
        self.runner.start()

    def film(self, job: VideoJob) -> Path:
        return self.films / job.id / "video.mp4"

    def status(self, job: VideoJob) -> str:
        found = self.store.get("", job.id)
        return f"{found.status} {found.progress} {found.error_code or ''}".strip() if found else "gone"

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)

    def until_status(self, job: VideoJob, status: str) -> None:
        self.until(lambda: self.status(job) == status)

    def accept(self, account: str = "") -> VideoJob:
        return self.runner.accept(job(account=account, created_at=time.time()))

    def refused(self, account: str = "") -> RequestError:
        with pytest.raises(RequestError) as full:
            self.accept(account)
        assert full.value.fault is Fault.QUEUE_FULL
        return full.value


@pytest.fixture
def desks(tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    opened: list[Desk] = []

    def open_desk(**limits: Any) -> Desk:
        opened.append(Desk(tmp_path, **limits))
        return opened[-1]

    yield open_desk
    for desk in opened:
        desk.runner.stop()
        desk.database.close()


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
