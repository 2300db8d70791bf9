"""Several checkpoints in one server: one device, one scheduler, stations of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.device.loading import load_models
from server.device.model import DeviceModel, Loaded
from server.front.engine import engine_settings
from server.front.service import Service
from server.start.films import open_jobs
from tests.server.conftest import make_settings
from tests.server.house import House, pixels, running, serving
from tests.server.thread_engine import ThreadEngine

NO_MODEL = "no-model"


def load_all(*folders: Path) -> Loaded:
    settings = make_settings(folders, max_batch=2)
    return load_models(engine_settings(settings, "cpu", "nowhere"), lambda done, total, what: None)


@pytest.fixture(scope="module")
def other_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same networks under another name, with one schedule fewer."""
    folder = tmp_path_factory.mktemp("more") / "other"
    shutil.copytree(checkpoint, folder)
    told = json.loads((folder / "cascade.json").read_text())
    del told["schedules"]["0+4"]
    (folder / "cascade.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def all_loaded(checkpoint: Path, film_checkpoint: Path, other_checkpoint: Path, tmp_path_factory: Any) -> Loaded:
    broken = tmp_path_factory.mktemp("broken") / NO_MODEL
    broken.mkdir()
    return load_all(checkpoint, film_checkpoint, broken, other_checkpoint)


@pytest.fixture
def house(all_loaded: Loaded, checkpoint: Path, tmp_path: Path) -> Iterator[House]:
    settings = make_settings(checkpoint, videos=tmp_path / "videos")
    with running(Service(settings, open_jobs, [("cpu", lambda: ThreadEngine(load=lambda _: all_loaded))])) as found:
        yield found


def film(house: House, **body: Any) -> dict[str, Any]:
    """Make a film; return its finished job."""
    job = house.client.post("/v1/videos", json={"prompt": "a rocket", "seed": 5, **body}).json()
    house.until(lambda: house.client.get(f"/v1/videos/{job['id']}").json()["status"] == "completed", "the film")
    finished: dict[str, Any] = house.client.get(f"/v1/videos/{job['id']}").json()
    return finished


def test_every_model_is_listed_and_the_route_chooses_where_none_is_named(house: House) -> None:
    assert [entry["id"] for entry in house.client.get("/v1/models").json()["data"]] == ["tiny", "tiny-wan", "other"]
    assert house.client.get("/v1/models/other").json()["rmd"]["media"] == "image"
    assert house.draw().status_code == 200
    assert house.metric("rmd_pictures_total", schedule="2+2") == 1
    assert film(house)["model"] == "tiny-wan"
    default = house.client.get("/v1/models/tiny-wan").json()["rmd"]["default_schedule"]
    assert house.metric("rmd_pictures_total", schedule=f"tiny-wan {default}") == 1
    assert house.metric("rmd_batch_size_count", station="tiny-wan encode") == 1


def test_pictures_are_those_of_a_server_that_holds_the_model_alone(house: House, other_checkpoint: Path) -> None:
    """Four models' worth of requests at once: batches of one model never hold another's."""
    names = ["tiny", "other", "tiny", "other"]
    house.gate = None
    calls = [
        house.in_background(lambda i=i, name=name: house.draw(f"prompt {i}", model=name, seed=i))
        for i, name in enumerate(names)
    ]
    together = [call.result().json()["data"][0]["b64_json"] for call in calls]
    (model,) = load_all(other_checkpoint).models
    with serving(model, make_settings(other_checkpoint)) as alone:
        for i, encoded in enumerate(together):
            own = alone.draw(f"prompt {i}", seed=i).json()["data"][0]["b64_json"]
            # Batches of other widths round differently in the last bits; the networks are the same.
            assert np.abs(pixels(encoded) - pixels(own)).max() <= 2
    assert house.metric("rmd_pictures_total", schedule="2+2") >= 2
    assert house.metric("rmd_pictures_total", schedule="other 2+2") == 2


def test_a_model_is_asked_only_for_what_it_has(house: House) -> None:
    assert house.draw(model="tiny", schedule="0+4").status_code == 200
    lacking = house.draw(model="other", schedule="0+4")
    assert lacking.status_code == 400 and lacking.json()["error"]["param"] == "schedule"
    films = house.draw(model="tiny-wan").json()["error"]
    assert films["param"] == "model" and films["code"] == "model_makes_films"
    pictures = house.client.post("/v1/videos", json={"prompt": "a", "model": "other"})
    assert pictures.status_code == 400 and pictures.json()["error"]["code"] == "model_makes_pictures"
    unknown = house.draw(model="dall-e-3")
    assert unknown.status_code == 404 and "'tiny', 'tiny-wan', 'other'" in unknown.json()["error"]["message"]


def test_a_checkpoint_that_cannot_be_loaded_is_named_and_the_others_serve(house: House) -> None:
    ready = house.client.get("/health/ready")
    assert ready.status_code == 200 and "safetensors" in ready.json()["not_loaded"][NO_MODEL]
    asked = house.draw(model=NO_MODEL)
    assert asked.status_code == 404 and "could not be loaded" in asked.json()["error"]["message"]
    assert house.client.get(f"/v1/models/{NO_MODEL}").status_code == 404


def test_where_none_can_be_loaded_the_reason_is_the_first_ones(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match="first"):
        load_all(tmp_path / "first", tmp_path / "second")


def test_a_film_outlives_its_server_also_where_other_models_serve_next(
    all_loaded: Loaded, checkpoint: Path, tmp_path: Path
) -> None:
    """Its job names its model, which a later server may hold at another place."""
    settings = make_settings(checkpoint, videos=tmp_path / "videos", drain_seconds=0)
    films = next(model for model in all_loaded.models if model.card.films)

    def serve(*models: DeviceModel) -> Service:
        return Service(settings, open_jobs, [("cpu", lambda: ThreadEngine(load=lambda _: Loaded(models)))])

    with running(serve(*all_loaded.models)) as first:
        finished = film(first)
    with running(serve(films)) as second:
        again = second.client.get(f"/v1/videos/{finished['id']}").json()
        assert again["status"] == "completed" and again["model"] == "tiny-wan"
        remixed = second.client.post(f"/v1/videos/{finished['id']}/remix", json={"prompt": "a boat"}).json()
        second.until(
            lambda: second.client.get(f"/v1/videos/{remixed['id']}").json()["status"] == "completed", "the remix"
        )


def test_checkpoints_come_as_flags_variables_and_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.start.settings import ServerSettings

    monkeypatch.setenv("RMD_CHECKPOINT", "models/a, models/b")
    assert ServerSettings().models == ((Path("models/a"), "a"), (Path("models/b"), "b"))
    one = ServerSettings(checkpoint=Path("models/c"), model_name="named")  # type: ignore[arg-type]
    assert one.models == ((Path("models/c"), "named"),)
    with pytest.raises(ValueError, match="both be the model 'a'"):
        ServerSettings(checkpoint=(Path("x/a"), Path("y/a")))
    with pytest.raises(ValueError, match="model_name names one model"):
        ServerSettings(model_name="named")
    monkeypatch.setenv("RMD_CHECKPOINT", "")
    with pytest.raises(ValueError, match="checkpoint"):
        ServerSettings()
