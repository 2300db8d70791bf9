"""Liveness, readiness and the metrics' truth."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from server.core.stations import StationKey
from server.device.model import DeviceModel, Loaded
from server.front.service import Service
from server.http.app import create_app
from server.start.settings import ServerSettings
from tests.server.conftest import load_on_cpu, make_settings
from tests.server.house import House, serving
from tests.server.thread_engine import ThreadEngine


def asgi(service: Service) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://localhost")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.anyio
async def test_live_at_once_and_ready_only_when_loaded(checkpoint: Path, model: DeviceModel) -> None:
    reported, go = threading.Event(), threading.Event()

    def slow(report: Callable[[int, int, str], None]) -> Loaded:
        report(3, 12, "loading engines")
        assert go.wait(30)
        return Loaded([model])

    service = Service(
        make_settings(checkpoint),
        lambda *_: pytest.fail("it makes pictures"),
        [("cpu", lambda: ThreadEngine(load=slow))],
        on_progress=lambda progress: reported.set(),
    )
    service.start()
    assert reported.wait(10)
    async with asgi(service) as client:
        assert (await client.get("/health/live")).status_code == 200
        waiting = await client.get("/health/ready")
        assert waiting.status_code == 503 and 5 <= int(waiting.headers["retry-after"]) <= 10
        assert waiting.json()["progress"] == {"done": 3, "total": 12, "text": "loading engines"}
        early = await client.post("/v1/images/generations", json={"prompt": "a"})
        assert early.status_code == 503 and early.json()["error"]["code"] == "not_ready"
        assert (await client.get("/v1/models")).status_code == 503
        shown = (await client.get("/metrics")).text
        assert "rmd_load_progress_ratio 0.25" in shown and 'rmd_engine_up{engine="0"} 0.0' in shown
        go.set()
        until(lambda: service.ready)
        ready = await client.get("/health/ready")
        assert ready.status_code == 200 and ready.json()["status"] == "ready"
        assert ready.json()["engines"] == [{"device": "cpu", "status": "ready", "restarts": 0, "reason": ""}]
        assert set(ready.json()["stations"]) == {key.label for key in _stations(model)}
        assert set(ready.json()["stations"].values()) == {"eager"}
        assert (await client.post("/v1/images/generations", json={"prompt": "a"})).status_code == 200
        assert 'rmd_engine_up{engine="0"} 1.0' in (await client.get("/metrics")).text
    service.stop()


def _stations(model: DeviceModel) -> tuple[StationKey, ...]:
    return (*model.card.stations(), *model.card.preview_stations())


@pytest.mark.anyio
async def test_a_model_that_cannot_be_loaded_is_reported(tmp_path: Path) -> None:
    failed = threading.Event()

    def load(report: Callable[[int, int, str], None]) -> Loaded:
        return Loaded([load_on_cpu(make_settings(tmp_path / "nothing"))])

    service = Service(
        make_settings(tmp_path / "nothing"),
        lambda *_: pytest.fail("there is no model"),
        [("cpu", lambda: ThreadEngine(load=load))],
        on_failed=lambda reason: failed.set(),
    )
    service.start()
    assert failed.wait(10)
    async with asgi(service) as client:
        ready = await client.get("/health/ready")
        assert ready.status_code == 503 and "nothing" in ready.json()["reason"]
        live = await client.get("/health/live")
        assert live.status_code == 503 and "nothing" in live.json()["reason"]
        assert (await client.post("/v1/images/generations", json={"prompt": "a"})).status_code == 503
    service.stop()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the end is on purpose
def test_a_server_whose_films_nobody_makes_is_not_ready(
    film_model: DeviceModel, film_settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their thread had ended, and films were taken that nobody would make."""
    with serving(film_model, film_settings) as house:
        assert house.client.get("/health/ready").status_code == 200 and house.metric("rmd_ready") == 1
        monkeypatch.setattr(house.service.jobs, "_feed", lambda: sys.exit("it ends"))
        house.client.post("/v1/videos", json={"prompt": "x"})
        house.until(lambda: house.client.get("/health/ready").status_code == 503, "the thread's end to be told")
        body = house.client.get("/health/ready").json()
        assert body["status"] == "unavailable" and "thread of the video jobs" in body["reason"]
        assert house.metric("rmd_ready") == 0 and house.client.get("/health/live").status_code == 200


def test_models_list_what_requests_may_ask_for(house: House) -> None:
    entry = house.client.get("/v1/models/tiny").json()
    assert entry == house.client.get("/v1/models").json()["data"][0]
    assert entry["rmd"]["sizes"] == ["64x64"] and entry["rmd"]["default_schedule"] == "2+2"
    assert set(entry["rmd"]["schedules"]) == {"2+2", "0+4", "teacher"}
    assert entry["rmd"]["text_tokens"] == 256
    assert set(entry["rmd"]["compiled"]) == {key.label for key in _stations(house.model)}
    assert entry["rmd"]["schedules"]["2+2"]["stages"] == [
        {"size": "32x32", "steps": 2},
        {"size": "64x64", "steps": 2},
    ]
    # By the fixture's costs: encode + steps + decode. The teacher's six steps are of two rows each.
    expected = {name: schedule["expected_seconds"] for name, schedule in entry["rmd"]["schedules"].items()}
    assert expected == {"2+2": 0.06, "0+4": 0.06, "teacher": 0.14}


def test_gauges_follow_the_state_and_counters_the_work(house: House) -> None:
    house.gate.close()
    calls = [house.in_background(lambda: house.draw(n=2)) for _ in range(3)]
    house.until_waiting(6)
    assert house.metric("rmd_in_flight_requests") == 3 and house.metric("rmd_in_flight_items") == 6
    house.gate.open()
    assert [call.result().status_code for call in calls] == [200] * 3
    assert house.metric("rmd_in_flight_items") == 0 and house.metric("rmd_in_flight_requests") == 0
    assert house.metric("rmd_queue_depth") == 0
    assert house.metric("rmd_pictures_total", schedule="2+2") == 6
    assert house.metric("rmd_steps_total", station="32x32") == 12
    assert house.metric("rmd_steps_total", station="64x64") == 12
    assert house.metric("rmd_tokens_total", station="32x32") == 12 * 4
    assert house.metric("rmd_tokens_total", station="64x64") == 12 * 16
    assert house.metric("rmd_requests_total", route="/v1/images/generations", outcome="completed") == 3
    assert house.metric("rmd_request_seconds_count", schedule="2+2") == 3
    assert house.metric("rmd_stage_seconds_count") == 12
    assert house.metric("rmd_decode_seconds_count") == 6
    assert house.metric("rmd_teacher_seconds", kind="eager") > 0
    assert house.metric("rmd_speedup_ratio", schedule="2+2", kind="eager") > 0
    assert house.metric("rmd_engine_memory_bytes", component="denoiser") > 1000
    assert house.metric("rmd_ready") == 1 and house.metric("rmd_draining") == 0
    assert house.metric("rmd_engine_up", engine="0") == 1 and house.metric("rmd_engine_restarts_total") == 0
    assert house.metric("rmd_station_compiled") == 0, "all runs eager"
    assert house.metric("rmd_teacher_age_seconds", kind="eager") > 0
    assert house.metric("rmd_teacher_spread_ratio", kind="eager") == 1


def test_probing_paths_cannot_grow_the_metrics(house: House) -> None:
    for i in range(5):
        house.client.get(f"/nowhere/{i}")
    assert house.metric("rmd_requests_total", route="other", outcome="not_found") == 5


def test_docs_describe_the_route(house: House) -> None:
    assert house.client.get("/docs").status_code == 200
    schema = house.client.get("/openapi.json").json()
    assert {"200", "400", "429", "503", "504"} <= set(schema["paths"]["/v1/images/generations"]["post"]["responses"])
