"""Films that share a device, a queue and a deadline; and a stop that does not wait for them."""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from server.core.costs import CostTable
from server.core.faults import machine_lacks
from server.device.model import DeviceModel
from server.films import database, runner
from server.front.media import encode_film
from server.start.settings import ServerSettings
from tests.server.house import serving
from tests.server.test_videos import URL, ended, post

TOGETHER = 8


def test_films_together_do_not_cost_each_other_their_time(
    film_model: DeviceModel, film_settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The low stage takes all of them at once; at the high one they wait for each other, beyond a film's own time."""
    full = max(film_model.card.sizes)
    wide, narrow = {1: 0.02, 2: 0.02, 4: 0.02, 8: 0.02}, {1: 0.2, 2: 0.4, 4: 0.8, 8: 1.6}
    table = {key: narrow if key.kind == "denoise" and key.size == full else wide for key in film_model.card.stations()}
    monkeypatch.setattr(film_model, "costs", CostTable(table))
    with serving(film_model, film_settings.model_copy(update={"video_deadline_seconds": 2.0})) as house:
        house.gate.before = lambda component, size, inputs: time.sleep(0.2 * (component == "denoiser" and size == full))
        house.gate.close()
        jobs = [post(house, seed=seed) for seed in range(TOGETHER)]
        house.until(lambda: house.service.admission.items == TOGETHER, "all of them at the device")
        house.gate.open()
        assert Counter(ended(house, job)["status"] for job in jobs) == {"completed": TOGETHER}
        metrics = house.client.get("/metrics").text
    assert f'rmd_videos_total{{outcome="completed"}} {TOGETHER}.0' in metrics
    assert f'rmd_request_seconds_count{{model="tiny-wan",schedule="{film_model.card.default}"}} {TOGETHER}.0' in metrics


def test_as_many_films_run_together_as_the_setting_says(film_model: DeviceModel, film_settings: ServerSettings) -> None:
    """Whatever their pixels: `queue_megapixels` bounds pictures."""
    few = 3.4 * max(film_model.card.sizes).pixels / 1e6
    with serving(film_model, film_settings.model_copy(update={"queue_megapixels": few})) as house:
        house.gate.close()
        jobs = [post(house) for _ in range(TOGETHER)]
        house.until(lambda: house.service.admission.items == TOGETHER, "all of them at the device")
        house.gate.open()
        assert {ended(house, job)["status"] for job in jobs} == {"completed"}


def test_a_stop_gives_films_back_though_a_batch_goes_on(
    film_model: DeviceModel, film_settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.front.service.LAST_BATCH_SECONDS", 0.5)
    with serving(film_model, film_settings) as house:
        house.gate.close()
        running = post(house)
        assert house.gate.arrived.wait(30)
        waiting = post(house)
        house.until(lambda: house.service.admission.items == 2, "both at the device")
        stopping = threading.Thread(target=house.service.stop)
        stopping.start()
        store = house.service.jobs.store

        def held(job_id: str) -> bool:
            found = store.get("", job_id)
            return found is not None and found.worker is not None

        house.until(lambda: not held(running["id"]) and not held(waiting["id"]), "the leases to be given back")
        house.gate.open()
        stopping.join()


def test_pages_of_other_sites_cannot_order_films(film_model: DeviceModel, film_settings: ServerSettings) -> None:
    foreign = {"Sec-Fetch-Site": "cross-site"}
    with serving(film_model, film_settings) as house:
        for reply in (
            house.client.post(URL, headers=foreign, content=b'{"prompt":"x"}'),
            house.client.post(URL, headers=foreign, files={"prompt": (None, "x")}),
        ):
            assert reply.status_code == 403 and reply.json()["error"]["code"] == "cross_site"
        assert house.client.get(URL, headers={"Sec-Fetch-Site": "same-origin"}).json()["data"] == []


def test_a_film_that_cannot_be_ready_in_time_is_not_accepted(
    film_model: DeviceModel, film_settings: ServerSettings
) -> None:
    with serving(film_model, film_settings.model_copy(update={"video_deadline_seconds": 1e-6})) as house:
        reply = house.client.post(URL, json={"prompt": "x"})
        assert reply.status_code == 400 and reply.json()["error"]["code"] == "takes_too_long"
        assert house.client.get(URL).json()["data"] == []


def test_a_film_that_fails_is_counted(film_model: DeviceModel, film_settings: ServerSettings) -> None:
    def broken(component: str, *_: object) -> None:
        if component == "denoiser":
            raise RuntimeError("broken")

    with serving(film_model, film_settings) as house:
        house.gate.before = broken
        assert ended(house, post(house))["error"]["code"] == "engine_failed"
        house.until(lambda: 'rmd_videos_total{outcome="engine_failed"} 1.0' in house.client.get("/metrics").text, "it")


@contextmanager
def few_descriptors(_folder: Path, _request: pytest.FixtureRequest) -> Iterator[None]:
    """None that is free may be used."""
    lowest = os.dup(0)
    os.close(lowest)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def full_disk(folder: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Where temporary files lie. It has room again afterwards, and is gone after the test."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", folder], check=True))
    yield
    subprocess.run(["mount", "-o", "remount,size=16m", folder], check=True)


@pytest.mark.parametrize(("lack", "named"), [(few_descriptors, "file descriptors"), (full_disk, "disk space")])
def test_a_film_that_the_machine_could_not_encode_for_a_while_is_made_again(
    film_model: DeviceModel,
    film_settings: ServerSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    lack: Callable[[Path, pytest.FixtureRequest], AbstractContextManager[None]],
    named: str,
) -> None:
    """40 of 40 failed for good."""
    monkeypatch.setattr(runner, "_TICK_SECONDS", 0.05)
    monkeypatch.setattr(database, "_RETRY_SECONDS", 0.1)
    small = tmp_path / "small"
    small.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(small))
    with serving(film_model, film_settings) as house:
        house.gate.close()
        jobs = [post(house, seed=seed) for seed in range(3)]
        house.until(lambda: house.service.admission.items == 3, "all at the device")
        with lack(small, request):
            house.gate.open()
            house.until(lambda: house.service.admission.items < 3, "one of them to be given up")
        assert [ended(house, job)["status"] for job in jobs] == ["completed"] * 3
        assert f"goes back in line: The server has too little {named}" in caplog.text
        assert house.metric("rmd_videos_total") == house.metric("rmd_videos_total", outcome="completed") == 3


def test_an_encoder_without_memory_is_the_machines_lack_and_not_the_films_fault() -> None:
    """x264 calls it an error of its own, and such films failed for good."""
    film = np.random.default_rng(0).integers(0, 255, (2, 1080, 1920, 3), np.uint8)
    encode_film(film[:1, :16, :16], 8)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (16 << 20), hard))
    try:
        with pytest.raises((MemoryError, OSError)) as lacking:
            encode_film(film, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert machine_lacks(lacking.value) == "memory"
