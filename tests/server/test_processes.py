"""Engines in processes of their own: killed, stopped, poisoned, broken; and a front that dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.front import member as member_module
from server.front.member import Health
from server.front.service import Service, engine_starts
from tests.server.conftest import make_settings
from tests.server.house import URL, House, pixels, running
from tests.server.sick_engine import BREAKS, DIES, HANGS, SickEngine

MANY = 40


def no_jobs(*_: Any) -> Any:
    pytest.fail("it makes pictures")


@contextlib.contextmanager
def engines(checkpoint: Path, **changes: Any) -> Iterator[House]:
    """A front in this process, and real engine processes."""
    quick = {"measure_teacher": False, "serve_teacher": False, "threads": 1, "log_level": "error"}
    settings = make_settings(checkpoint, **{**quick, **changes})
    with running(Service(settings, no_jobs, engine_starts(settings, SickEngine))) as house:
        until_all_ready(house)
        house.client.timeout = httpx.Timeout(100)
        yield house


def until_all_ready(house: House) -> None:
    house.until(lambda: all(each.health is Health.READY for each in house.service.fleet.members), "every engine")


def pid(house: House, index: int = 0) -> int:
    link = house.service.fleet.members[index].link
    assert link is not None
    return link.pid


def draw_all(house: House, count: int = MANY) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=count)
    with httpx.Client(base_url=house.url, timeout=90, limits=limits) as client, ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda seed: client.post(URL, json={"prompt": "a", "seed": seed}), range(count)))


def pictures(replies: list[httpx.Response]) -> list[str]:
    assert Counter(reply.status_code for reply in replies) == {200: len(replies)}
    return [reply.json()["data"][0]["b64_json"] for reply in replies]


@pytest.fixture(autouse=True)
def _engines_may_end_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are started again at once: the tests end more of them than ten minutes usually see."""
    monkeypatch.setattr(member_module, "_LONGEST_PAUSE_SECONDS", 0.0)


def test_an_engine_killed_in_the_middle_costs_no_request(checkpoint: Path) -> None:
    with engines(checkpoint, max_batch=1) as house:
        undisturbed = pictures(draw_all(house))
        first = pid(house)
        calls = house.in_background(lambda: draw_all(house))
        house.until(lambda: house.metric("rmd_pictures_total") >= MANY + 5, "some of them done")
        assert house.service.admission.items > 5, "and others not"
        os.kill(first, signal.SIGKILL)
        assert pictures(calls.result(90)) == undisturbed, "the same to the bit"
        assert pid(house) != first and house.metric("rmd_engine_restarts_total") == 1
        house.until_idle()
        assert house.metric("rmd_pictures_total") == 2 * MANY and house.metric("rmd_queue_depth") == 0


def test_two_engines_share_the_work_and_one_is_enough(checkpoint: Path) -> None:
    with engines(checkpoint, max_batch=1, devices="cpu,cpu") as house:
        served: Counter[int] = Counter()
        place = house.service.fleet._place

        def counting(generation: Any) -> None:
            place(generation)
            served[generation.places[0].engine] += 1

        house.service.fleet._place = counting  # type: ignore[method-assign]
        undisturbed = pictures(draw_all(house))
        assert min(served[0], served[1]) > MANY // 5, served
        calls = house.in_background(lambda: draw_all(house))
        house.until(lambda: house.metric("rmd_pictures_total") >= MANY + 5, "some of them done")
        os.kill(pid(house, 1), signal.SIGKILL)
        house.until(lambda: house.metric("rmd_engine_up", engine="1") == 0, "the metric to say so")
        assert house.client.get("/health/ready").status_code == 200, "one is enough"
        assert pictures(calls.result(90)) == undisturbed
        until_all_ready(house)


@pytest.fixture(scope="module")
def sick(checkpoint: Path) -> Iterator[House]:
    """One engine whose widths are two, and a front that soon takes silence for a hang."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member_module, "_FAILURES", 100)
        patch.setattr(member_module, "_LONGEST_PAUSE_SECONDS", 0.0)
        with engines(checkpoint, max_batch=2, policy="continuous", watchdog_seconds=2.0, deadline_seconds=90) as house:
            yield house


def test_an_engine_that_stops_is_ended_and_another_finishes_the_request(sick: House) -> None:
    """Probes do not pretend meanwhile."""
    until_all_ready(sick)
    restarts = sick.metric("rmd_engine_restarts_total")
    os.kill(pid(sick), signal.SIGSTOP)
    call = sick.in_background(lambda: sick.draw("stopped"))
    sick.until(lambda: sick.client.get("/health/ready").status_code == 503, "the probe to say so")
    body = sick.client.get("/health/ready").json()
    assert body["engines"][0]["status"] in ("restarting", "loading") and sick.metric("rmd_ready") == 0
    assert body["status"] == "unavailable" and "no engine works" in body["reason"]
    assert sick.client.get("/health/live").status_code == 200, "it will be back"
    assert call.result(90).status_code == 200
    assert sick.metric("rmd_engine_restarts_total") == restarts + 1


def _together(house: House, prompts: list[str]) -> list[Any]:
    """Hand requests to an engine at one moment."""
    until_all_ready(house)
    engine, before = pid(house), house.service.admission.items
    os.kill(engine, signal.SIGSTOP)
    calls = [house.in_background(lambda p=prompt, i=i: house.draw(p, seed=i)) for i, prompt in enumerate(prompts)]
    house.until_waiting(before + len(prompts))
    os.kill(engine, signal.SIGCONT)
    return calls


def test_a_request_that_kills_engines_fails_alone_after_the_second(sick: House) -> None:
    until_all_ready(sick)
    clean = sick.draw("mate 0", seed=0).json()["data"][0]["b64_json"]
    restarts = sick.metric("rmd_engine_restarts_total")
    calls = _together(sick, ["mate 0", DIES, "mate 2", "mate 3"])
    replies = [call.result(90) for call in calls]
    assert [reply.status_code for reply in replies] == [200, 500, 200, 200]
    assert replies[1].json()["error"]["code"] == "engine_failed"
    assert abs(pixels(replies[0].json()["data"][0]["b64_json"]) - pixels(clean)).max() <= 1
    sick.until(lambda: sick.metric("rmd_engine_restarts_total") == restarts + 2, "two engines, and no more")


def test_a_step_that_never_returns_is_ended(sick: House, caplog: pytest.LogCaptureFixture) -> None:
    until_all_ready(sick)
    assert sick.draw(HANGS).status_code == 500, "two engines hung over it"
    assert "took" in caplog.text and "it was ended" in caplog.text


def test_an_engine_that_raises_for_everybody_is_replaced(sick: House) -> None:
    """Plain RuntimeErrors, whatever runs: not the requests' fault, so the engine goes, and they are served."""
    until_all_ready(sick)
    restarts = sick.metric("rmd_engine_restarts_total")
    calls = _together(sick, [BREAKS, *(f"innocent {number}" for number in range(8))])
    statuses = [call.result(90).status_code for call in calls]
    sick.until(lambda: sick.metric("rmd_engine_restarts_total") > restarts, "a new engine")
    assert set(statuses) <= {200, 500} and statuses.count(200) >= 5, "but for those that the breaker counted"


def test_a_device_that_breaks_again_and_again_is_given_up(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_module, "_FAILURES", 2)
    with engines(checkpoint, max_batch=1) as house:
        os.kill(pid(house), signal.SIGKILL)
        house.until(lambda: house.metric("rmd_engine_restarts_total") == 1, "another try")
        until_all_ready(house)
        os.kill(pid(house), signal.SIGKILL)
        house.until(lambda: house.client.get("/health/live").status_code == 503, "the end")
        ready = house.client.get("/health/ready")
        assert ready.status_code == 503 and ready.json()["engines"][0]["status"] == "dead"
        assert house.draw().status_code == 503


def test_an_engine_does_not_outlive_its_front(checkpoint: Path) -> None:
    script = f"""
import sys, time
from server.front.engine import EngineProcess
from server.start.settings import ServerSettings
chosen = dict(checkpoint={str(checkpoint)!r}, backend="eager", measure_teacher=False, serve_teacher=False)
engine = EngineProcess.start(ServerSettings(**chosen, dtype="float32"), "cpu")
while type(engine.receive(60)[0]).__name__ != "Ready": pass
print(engine.pid, flush=True)
time.sleep(600)
"""
    front = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert front.stdout is not None
        engine = int(front.stdout.readline())
        os.kill(engine, 0)
    finally:
        front.kill()
        front.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{engine}").exists():
        assert time.monotonic() < end, "it works on for nobody"
        time.sleep(0.02)
