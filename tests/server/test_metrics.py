"""What the server tells of itself at a scrape, beside what test_health.py holds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from server.device.model import DeviceModel
from server.films.database import Database
from server.films.store import JobStore
from server.films.tables import VideoJob
from server.front.member import Member, WatchLimits
from server.start.settings import ServerSettings
from server.telemetry.machine import gpu_gauges
from tests.server.conftest import make_settings
from tests.server.house import URL, House, serving

OPEN_METRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}


class NVMLError(Exception):
    pass


class TwoGpus:
    """Answers as NVML's own module does, for a machine with two GPUs, one of which does not tell its power."""

    NVMLError = NVMLError

    class Memory:
        used, total = 3 << 30, 80 << 30

    class Rates:
        gpu, memory = 75, 20

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetCount": lambda: 3,
            "nvmlDeviceGetHandleByIndex": self.handle,
            "nvmlDeviceGetUUID": lambda gpu: f"GPU-{gpu}",
            "nvmlDeviceGetMemoryInfo": lambda gpu: self.Memory,
            "nvmlDeviceGetUtilizationRates": lambda gpu: self.Rates,
            "nvmlDeviceGetPowerUsage": self.power,
        }
        return answers[name]

    def handle(self, index: int) -> int:
        if index == 2:
            raise NVMLError("lost")
        return index

    def power(self, gpu: int) -> int:
        if gpu == 1:
            raise NVMLError("not supported")
        return 350_500


def test_gpus_tell_what_they_can() -> None:
    told = {(s.name, s.labels["gpu"]): s.value for family in gpu_gauges(TwoGpus()) for s in family.samples}
    assert told[("rmd_device_power_watts", "GPU-0")] == 350.5
    assert told[("rmd_device_utilization_ratio", "GPU-1")] == 0.75
    assert told[("rmd_device_memory_used_bytes", "GPU-1")] == 3 << 30 and len(told) == 7


def test_the_api_that_gpus_are_asked_by_is_nvmls_own() -> None:
    nvml = pytest.importorskip("pynvml", reason="the extra 'nvml' is not installed")
    for name in ("Init", "DeviceGetCount", "DeviceGetHandleByIndex", "DeviceGetUUID", "DeviceGetMemoryInfo",
                 "DeviceGetPowerUsage", "DeviceGetUtilizationRates"):  # fmt: skip
        assert callable(getattr(nvml, f"nvml{name}"))
    assert {"gpu"} <= {name for name, _ in nvml.c_nvmlUtilization_t._fields_}
    assert {"used", "total"} <= {name for name, _ in nvml.c_nvmlMemory_t._fields_}


def test_every_metric_is_in_openmetrics_with_help_and_bounded_labels(house: House) -> None:
    body = {"prompt": "a", "stream": True, "partial_images": 2}
    assert house.client.post(URL, json=body).status_code == 200
    reply = house.client.get("/metrics", headers=OPEN_METRICS)
    assert reply.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in text_string_to_metric_families(reply.text)}
    assert all(family.documentation.endswith(".") for name, family in families.items() if name.startswith("rmd_"))
    units = ("_seconds", "_bytes", "_ratio", "_watts")
    for name, family in families.items():
        if family.type == "histogram" and name.startswith("rmd_"):
            assert name.endswith(units) or name == "rmd_batch_size", name
    assert house.metric("rmd_first_partial_seconds_count", model="tiny", schedule="2+2") == 1, "the first of two"
    assert house.metric("rmd_build_info", version=families["rmd_build"].samples[0].labels["version"]) == 1
    assert {"version", "commit", "torch", "python"} == set(families["rmd_build"].samples[0].labels)
    assert house.metric("rmd_model_info", model="tiny", backend="eager") == 1
    assert house.metric("rmd_disk_size_bytes", store="videos") > house.metric("rmd_disk_free_bytes", store="videos") > 0
    house.until(lambda: house.metric("rmd_event_loop_lag_seconds_count") > 0, "the loop's lag")
    plain = house.client.get("/metrics")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_admitted_work_is_that_of_what_waits(house: House) -> None:
    assert house.metric("rmd_admitted_work_seconds") == 0
    house.gate.close()
    first = house.in_background(lambda: house.draw(n=2))
    house.until(lambda: house.metric("rmd_batch_running_seconds", engine="0") > 0, "a batch")  # of its text alone
    calls = [first, house.in_background(lambda: house.draw(n=2))]
    house.until_waiting(4)
    # By the fixture's costs: four steps and decoding, 10 ms each.
    assert house.metric("rmd_admitted_work_seconds") == pytest.approx(4 * 0.05)
    assert house.metric("rmd_batch_expected_seconds", engine="0") == pytest.approx(0.01)
    house.gate.open()
    assert [call.result().status_code for call in calls] == [200, 200]
    assert house.metric("rmd_admitted_work_seconds") == 0 and house.metric("rmd_batch_running_seconds") == 0


def test_times_of_films_are_not_all_beyond_the_last_bucket(house: House) -> None:
    metrics = house.service.metrics
    metrics.video_ended("wan", "3+3", "completed", 5 * 3600.0)
    metrics.step_seconds.labels("720x1280").observe(45.0)
    assert house.metric("rmd_request_seconds_bucket", model="wan", le="28800.0") == 1
    assert house.metric("rmd_request_seconds_bucket", model="wan", le="14400.0") == 0
    assert house.metric("rmd_step_seconds_bucket", station="720x1280", le="60.0") == 1


def test_films_in_line_are_shown_also_those_that_nobody_here_makes(tmp_path: Path) -> None:
    def job(model: str, age: float) -> VideoJob:
        return VideoJob("", model, {"prompt": "a"}, "1", "64x64", time.time() - age)

    database = Database(f"sqlite:///{tmp_path / 'jobs.sqlite3'}")
    store = JobStore(database)
    for model, age in (("mine", 50.0), ("mine", 70.0), ("gone", 900.0)):
        store.add(job(model, age))
    line = store.line(["mine"])
    assert (line.waiting, line.unserved) == (2, 1) and time.time() - (line.oldest or 0) == pytest.approx(70, abs=5)
    begun = store.claim(["mine"], "worker", 30.0)
    assert begun is not None and store.advance(begun.id, "worker", 0)
    assert store.line(["mine"]).waiting == 1
    assert store.renew(begun.id, "worker", -1.0), "its worker ends"
    assert store.line(["mine"]).waiting == 2, "it waits again"
    database.close()


def test_a_server_under_another_models_name_shows_whose_films_it_leaves(
    film_model: DeviceModel, film_settings: ServerSettings
) -> None:
    film_settings.videos.mkdir()
    database = Database(film_settings.video_database_url)
    left = JobStore(database).add(VideoJob("", "another", {"prompt": "a"}, "1", "64x64", time.time() - 100))
    database.close()
    with serving(film_model, film_settings) as house:
        house.until(lambda: house.metric("rmd_video_unserved_jobs") == 1, "the line to be counted")
        assert house.metric("rmd_video_oldest_seconds") == 0
        assert left.open


def test_a_film_that_nobody_took_in_time_is_counted(film_model: DeviceModel, film_settings: ServerSettings) -> None:
    """Jobs that were given up were in no metric."""
    film_settings.videos.mkdir()
    database = Database(film_settings.video_database_url)
    late = VideoJob("", "tiny-wan", {"prompt": "a", "schedule": "3+3"}, "1", "64x64", time.time() - 100)
    late.begin_by = time.time() - 50
    JobStore(database).add(late)
    database.close()
    with serving(film_model, film_settings) as house:
        house.until(lambda: house.metric("rmd_videos_total", outcome="deadline") == 1, "it to be counted")
        assert house.metric("rmd_videos_total") == 1 and house.metric("rmd_steps_total") == 0


def test_an_engine_says_when_its_batches_end_by_its_own_clock(checkpoint: Path, model: DeviceModel) -> None:
    from server.core.messages import Ended, Ready
    from server.core.stations import StationKey

    member = Member(0, "cpu", lambda: None, WatchLimits())  # type: ignore[arg-type,return-value]
    ended = Ended(1, StationKey("encode"), 1, 1, 0.5, (), at=70.0)
    assert member.time_of(ended) == pytest.approx(time.time(), abs=5), "not told: as heard"
    member.ready(Ready((), (), {}, clock=1000.0))
    assert member.time_of(ended) == 1070.0
    with serving(model, make_settings(checkpoint)) as house:
        assert house.service.fleet.members[0].clock == pytest.approx(time.time() - time.monotonic(), abs=1)
