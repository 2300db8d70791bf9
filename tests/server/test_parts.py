"""Widths, priorities, permits; a slow client, a taken port, the progress bar: each alone."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from starlette.types import Message

from rmd.presets import preset
from rmd.size import Size
from server.api import streaming
from server.core.admission import Admission
from server.core.latency import LatencyTable, StationKey
from server.core.policies.stagewise import StagePolicy
from server.core.request import Generation, GenerationSpec, partial_steps
from server.core.stations import Stations
from server.front.service import Progress, Service
from server.http.errors import ApiError, Fault
from server.start.progress import ProgressLine
from server.start.run import make_server
from server.start.settings import ServerSettings
from tests.server.house import Clock

LOW, HIGH = StationKey("denoise", size=Size(128, 128)), StationKey("denoise", size=Size(256, 256))


@pytest.mark.parametrize(
    ("buckets", "waiting", "expected"),
    [
        ({1: 1.0, 2: 1.05, 4: 1.1, 8: 1.2}, 8, 8),  # a launch-bound low stage: everything rides
        ({1: 1.0, 2: 1.05, 4: 1.1, 8: 1.2}, 3, 3),  # padded to 4, still the best
        ({1: 1.0, 2: 2.0, 4: 4.0}, 8, 1),  # a saturated high stage: one at a time
        ({1: 1.0, 2: 1.9, 4: 3.8}, 8, 1),  # 5 % more is under the 10 % that width must pay
        ({1: 1.0, 2: 1.9, 4: 3.2}, 8, 4),  # 2 does not pay, 4 does
        ({1: 1.0, 8: 3.0}, 2, 1),  # two in a bucket of 8 would be slower than one after the other
        ({1: 1.0, 8: 3.0}, 4, 4),
        ({}, 5, 1),
    ],
)
def test_batches_are_as_wide_as_they_pay(buckets: dict[int, float], waiting: int, expected: int) -> None:
    assert LatencyTable({LOW: buckets}).best_count(LOW, [1] * waiting) == expected


def test_guided_entries_take_two_rows() -> None:
    table = LatencyTable({LOW: {1: 1.0, 2: 1.0, 4: 1.0}})
    assert table.best_count(LOW, [2, 2, 2]) == 2
    assert table.best_count(LOW, [2, 1, 1, 1]) == 3
    assert LatencyTable({LOW: {1: 1.0}}).best_count(LOW, [2, 2]) == 1, "wider than any bucket, still served"


def test_estimates_follow_what_the_machine_does() -> None:
    table = LatencyTable({LOW: {1: 0.1, 4: 0.2}})
    assert table.seconds(LOW, 3) == pytest.approx(0.2)
    assert table.seconds(LOW, 9) == pytest.approx(0.2 * 2 + 0.1)
    for _ in range(100):
        table.observe(LOW, 1, 0.3)
    assert table.seconds(LOW, 1) == pytest.approx(0.3, rel=0.01)
    assert table.seconds(LOW, 4) == pytest.approx(0.6, rel=0.01)
    assert table.width(LOW) == 4


def test_one_stalled_batch_bends_no_estimate() -> None:
    table = LatencyTable({LOW: {1: 0.1}})
    table.observe(LOW, 1, 30.0)
    assert table.seconds(LOW, 1) == pytest.approx(0.1)
    for _ in range(20):
        table.observe(LOW, 1, 0.2)
    table.observe(LOW, 1, 30.0)
    assert table.seconds(LOW, 1) == pytest.approx(0.2)


def test_buckets_that_ran_out_of_memory_are_not_asked_for_again() -> None:
    table = LatencyTable({LOW: {1: 1.0, 2: 1.05, 4: 1.1, 8: 1.2}})
    table.narrow(LOW, 5)
    assert table.buckets(LOW) == (1, 2, 4) and table.best_count(LOW, [1] * 8) == 4
    table.narrow(LOW, 1)
    assert table.buckets(LOW) == (1,), "the smallest stays: there is nothing else to try"


def generation(cost: float, arrived: float, steps: int = 4, seeds: int = 1) -> Generation:
    cascade = preset("embedded")
    spec = GenerationSpec("a", "2+2", cascade, "student", tuple(range(seeds)))
    permit = Admission(100, 10**9).acquire(seeds, 1)
    made = Generation(spec, permit, 1e9, lambda event: None, [cost * (4 - k) / 4 + 0.01 for k in range(5)])
    made.arrived = arrived
    made.conditioning = {}
    return made


def test_what_is_nearly_done_goes_first_and_waiting_always_wins_in_the_end() -> None:
    stations, policy = Stations(), StagePolicy(LatencyTable({LOW: {1: 0.1}, HIGH: {1: 0.1}}))
    fresh, nearly_done = generation(1.0, arrived=0.0).items[0], generation(1.0, arrived=0.0).items[0]
    nearly_done.step = 3
    for item in (fresh, nearly_done):
        stations.join(item.station(), item)
    chosen = policy.choose(stations, now=1.0)
    assert chosen is not None and chosen[0].key == HIGH and chosen[1] == [nearly_done]

    long, short = generation(50.0, arrived=0.0).items[0], generation(1.0, arrived=10.0).items[0]
    stations = Stations()
    for item in (long, short):
        stations.join(item.station(), item)

    def first(now: float) -> Any:
        chosen = policy.choose(stations, now)
        assert chosen is not None
        return chosen[1][0]

    assert first(now=12.0) is short, "a short request passes a long one that came before it"
    for arrived in (100.0, 200.0, 300.0, 400.0):
        short.generation.arrived = arrived
        if first(now=arrived + 1.0) is long:
            break
    else:
        pytest.fail("a steady stream of short requests starves the long one")


def test_what_is_about_to_miss_its_deadline_goes_before_everything_else() -> None:
    """Short requests that keep coming have the higher ratio, but only until the long one's time runs out."""
    policy, stations = StagePolicy(LatencyTable({LOW: {1: 0.1}})), Stations()
    long = generation(50.0, arrived=0.0).items[0]
    long.generation.deadline = 120.0
    shorts = [generation(0.1, arrived=float(now)).items[0] for now in range(0, 120, 10)]
    for item in (long, *shorts):
        stations.join(item.station(), item)
    first = [(policy.choose(stations, now) or pytest.fail())[1][0] for now in (19.0, 21.0)]
    assert first[0] in shorts and first[1] is long, "100 seconds are twice its work"


def test_pictures_of_one_prompt_count_once_where_prompts_are_encoded() -> None:
    encode = StationKey("encode")
    policy, stations = StagePolicy(LatencyTable({encode: {1: 1.0, 2: 1.0, 4: 1.0}})), Stations()
    requests = [generation(1.0, arrived=float(i), seeds=8) for i in range(5)]
    for request in requests:
        request.conditioning = None
        for item in request.items:
            stations.join(encode, item)
    chosen = policy.choose(stations, now=10.0)
    assert chosen is not None
    assert {id(item.generation) for item in chosen[1]} == set(map(id, requests[:4])) and len(chosen[1]) == 32


def test_nothing_queued_means_nothing_to_run() -> None:
    assert StagePolicy(LatencyTable({})).choose(Stations(), 0.0) is None


@pytest.mark.parametrize(
    ("schedule", "wanted", "expected"),
    [("2+2", 0, ()), ("2+2", 1, (1,)), ("2+2", 3, (1,)), ("0+4", 1, (2,)), ("0+4", 3, (1, 2)), ("1+3", 2, (0,))],
)
def test_partial_pictures_come_at_stage_ends(schedule: str, wanted: int, expected: tuple[int, ...]) -> None:
    assert partial_steps(preset("embedded", schedule=schedule), wanted) == expected


def test_permits_are_bounded_and_given_back_once() -> None:
    admission = Admission(4, 10**6)
    first, second = admission.acquire(3, 10), admission.acquire(1, 10)
    with pytest.raises(ApiError) as full:
        admission.acquire(1, 10)
    assert full.value.fault is Fault.QUEUE_FULL
    first.release()
    first.release()
    assert admission.items == 1
    second.release(finished=True)
    assert admission.items == 0 and admission.wait_idle(0)


def test_pictures_of_one_request_leave_one_by_one() -> None:
    admission = Admission(4, 100)
    permit = admission.acquire(3, 90)
    permit.leave(finished=True)
    assert (admission.items, admission.requests) == (2, 1)
    admission.acquire(2, 40).release()  # 60 pixels are left to the first
    permit.leave(finished=True)
    permit.release()
    permit.leave(finished=True)
    assert (admission.items, admission.requests) == (0, 0) and admission.wait_idle(0)


def test_retry_after_follows_pictures_that_leave_in_batches() -> None:
    clock = Clock()
    admission = Admission(8, 10**9, seconds_per_item=1.0, clock=clock)
    held = [admission.acquire(1, 1) for _ in range(8)]
    for _ in range(8):  # eight at a moment, every 16 seconds: one in 2 seconds
        clock.now += 16.0
        for permit in held:
            permit.leave(finished=True)
        held = [admission.acquire(1, 1) for _ in range(8)]
    with pytest.raises(ApiError, match=r"8 of 8 pictures, 0\.0 of 1000\.0 megapixels") as full:
        admission.acquire(5, 1)
    assert full.value.retry_after == 10


def test_retry_after_follows_the_drain_rate() -> None:
    clock = Clock()
    admission = Admission(10, 10**9, seconds_per_item=2.0, clock=clock)

    def retry_after(items: int) -> int:
        with pytest.raises(ApiError) as full:
            admission.acquire(items, 1)
        assert full.value.retry_after is not None
        return full.value.retry_after

    held = [admission.acquire(1, 1) for _ in range(10)]
    assert retry_after(1) == 2 and retry_after(5) == 10
    for _ in range(60):  # pictures really leave at one in 7 seconds
        clock.now += 7.0
        held.pop(0).release(finished=True)
        held.append(admission.acquire(1, 1))
    assert retry_after(1) == 7 and retry_after(10) == 70


def test_a_slow_client_is_waited_for_as_long_as_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CLIENT_PATIENCE_SECONDS", 0.2)
    body, taken = bytes(range(256)) * 2560, list[Message]()

    async def slow(message: Message) -> None:
        await asyncio.sleep(0.03)
        taken.append(message)

    async def stuck(_message: Message) -> None:
        await asyncio.sleep(60)

    async def scenario() -> None:
        await streaming._impatient(slow)({"type": "http.response.body", "body": body, "more_body": False})
        with pytest.raises(TimeoutError):
            await streaming._impatient(stuck)({"type": "http.response.body", "body": b"x", "more_body": True})

    asyncio.run(scenario())
    assert len(taken) == 10, "together longer than the patience for one"
    assert b"".join(message["body"] for message in taken) == body
    assert [message["more_body"] for message in taken] == [True] * 9 + [False]


def test_a_taken_port_is_told_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServerSettings(port=taken.getsockname()[1])
        with pytest.raises(ValueError, match=r"cannot listen on 127\.0\.0\.1 port .*; choose another --port"):
            make_server(Service(settings, lambda *_: pytest.fail("it was loaded")))


def test_the_progress_bar_goes_on_after_the_engines_and_ends_when_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    with ProgressLine() as line:
        line.update(Progress(3, 3, "building engines"))
        line.update(Progress(1, 4, "loading the weights"))
        line.update(Progress(4, 4, "ready"))
        shown = capsys.readouterr().err
        line.update(Progress(4, 4, "after the end"))
    assert "ready" in shown and "after the end" not in shown + capsys.readouterr().err
