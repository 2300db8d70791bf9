"""Films that share a device, a queue and a deadline; and a stop that does not wait for them."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter

import pytest

from server.core.costs import CostTable
from server.device.model import DeviceModel
from server.films import runner
from server.front import packaging
from server.front.media import Pixels, encode_film
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


def test_a_film_that_the_machine_could_not_encode_just_then_is_made_again(
    film_model: DeviceModel, film_settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[BaseException] = [MemoryError(), OSError(errno.EMFILE, os.strerror(errno.EMFILE))]

    def crowded(pixels: Pixels, frames_per_second: int) -> bytes:
        if faults:
            raise faults.pop()
        return encode_film(pixels, frames_per_second)

    monkeypatch.setattr(runner, "_TICK_SECONDS", 0.05)
    with serving(film_model, film_settings) as house:
        monkeypatch.setattr(packaging, "encode_film", crowded)
        assert ended(house, post(house))["status"] == "completed" and not faults
