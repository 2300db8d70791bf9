"""Liveness, readiness and the metrics' truth."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from server.device.model import ServedModel
from server.front.service import Progress, Service
from server.http.app import create_app
from server.start.settings import ServerSettings
from tests.server.conftest import make_settings
from tests.server.house import House


def asgi(service: Service) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://server")


@pytest.mark.anyio
async def test_live_at_once_and_ready_only_when_loaded(checkpoint: Path, model: ServedModel) -> None:
    loading, go = threading.Event(), threading.Event()

    def slow(settings: ServerSettings, report: Callable[[Progress], None]) -> ServedModel:
        report(Progress(3, 12, "building denoiser 32x32"))
        loading.set()
        go.wait(10)
        return model

    service = Service(make_settings(checkpoint), slow)
    service.start()
    assert loading.wait(10)
    async with asgi(service) as client:
        assert (await client.get("/health/live")).status_code == 200
        waiting = await client.get("/health/ready")
        assert waiting.status_code == 503
        assert waiting.json()["progress"] == {"done": 3, "total": 12, "text": "building denoiser 32x32"}
        early = await client.post("/v1/images/generations", json={"prompt": "a"})
        assert early.status_code == 503 and early.json()["error"]["code"] == "not_ready"
        assert (await client.get("/v1/models")).status_code == 503
        assert "rmd_load_progress 0.25" in (await client.get("/metrics")).text
        go.set()
        for _ in range(500):
            if (ready := await client.get("/health/ready")).status_code == 200:
                break
            threading.Event().wait(0.01)
        assert ready.json() == {"status": "ready"}
        assert (await client.post("/v1/images/generations", json={"prompt": "a"})).status_code == 200
    service.stop()


@pytest.mark.anyio
async def test_a_model_that_cannot_be_loaded_is_reported(tmp_path: Path) -> None:
    from server.start.loading import load_model

    failed = threading.Event()
    service = Service(make_settings(tmp_path / "nothing"), load_model, on_failed=lambda error: failed.set())
    service.start()
    assert failed.wait(10)
    async with asgi(service) as client:
        ready = await client.get("/health/ready")
        assert ready.status_code == 503 and "nothing" in ready.json()["reason"]
        for _ in range(200):
            if (live := await client.get("/health/live")).status_code == 503:
                break
            threading.Event().wait(0.01)
        assert live.status_code == 503
        assert (await client.post("/v1/images/generations", json={"prompt": "a"})).status_code == 503
    service.stop()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_models_list_what_requests_may_ask_for(house: House) -> None:
    entry = house.client.get("/v1/models/tiny").json()
    assert entry == house.client.get("/v1/models").json()["data"][0]
    assert entry["rmd"]["sizes"] == ["64x64"] and entry["rmd"]["default_schedule"] == "2+2"
    assert set(entry["rmd"]["schedules"]) == {"2+2", "0+4", "teacher"}
    assert entry["rmd"]["schedules"]["2+2"]["stages"] == [
        {"size": "32x32", "steps": 2},
        {"size": "64x64", "steps": 2},
    ]


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
    assert house.metric("rmd_speedup", schedule="2+2", kind="eager") > 0
    assert house.metric("rmd_engine_memory_bytes", component="denoiser") > 1000
    assert house.metric("rmd_ready") == 1 and house.metric("rmd_draining") == 0


def test_probing_paths_cannot_grow_the_metrics(house: House) -> None:
    for i in range(5):
        house.client.get(f"/nowhere/{i}")
    assert house.metric("rmd_requests_total", route="other", outcome="not_found") == 5


def test_docs_describe_the_route(house: House) -> None:
    assert house.client.get("/docs").status_code == 200
    schema = house.client.get("/openapi.json").json()
    assert {"200", "400", "429", "503", "504"} <= set(schema["paths"]["/v1/images/generations"]["post"]["responses"])
