"""From a checkpoint folder to a model that is measured; the baseline of the teacher; what cannot be loaded."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from engines.build.checkpoint import build_checkpoint
from engines.errors import BackendUnavailable
from engines.plan.options import EngineOptions
from rmd.backbones.tiny import write_tiny_decoder, write_tiny_folder
from rmd.checkpoint import CASCADE_FILE, CheckpointFolder
from rmd.size import Size
from server.core.stations import STUDENT, TEACHER, StationKey
from server.device import loading
from server.device.baseline import EagerTeacher
from server.device.measuring import measure_station
from server.device.model import DeviceModel
from server.front.service import Service
from tests.server.conftest import TEACHER_STEPS, load_on_cpu, make_settings
from tests.server.house import Gate, House, pixels, running, serving
from tests.server.thread_engine import ThreadEngine


def test_every_station_is_timed_and_the_start_says_how_far_it_is(checkpoint: Path) -> None:
    from server.device.loading import load_model
    from server.front.engine import engine_settings

    seen: list[tuple[int, int, str]] = []
    settings = engine_settings(make_settings(checkpoint, max_batch=2), "cpu", "nowhere")
    model = load_model(settings, lambda done, total, what: seen.append((done, total, what)))
    stations = (*model.card.stations(), *model.card.preview_stations())
    table = model.costs.table()
    assert set(table) == set(stations)
    assert all(1 in widths and all(seconds > 0 for seconds in widths.values()) for widths in table.values())
    assert [what for _, _, what in seen] == [
        "reading tiny",
        "loading the weights of tiny",
        "timing the eager teacher of tiny",
        "preparing",
        *(f"warming up {key.label}" for key in stations),
    ]
    assert all(0 <= done < total for done, total, _ in seen)
    assert model.card.executor_kind == "eager" and not any(model.card.compiled.values())
    assert model.card.memory_bytes["denoiser"] > 0 and model.card.memory_bytes["teacher denoiser"] > 0
    assert model.card.text_limit == 256, "of the encoder that hears most"


def test_engines_that_are_built_meanwhile_are_taken_over_and_found_at_the_next_start(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Through the engine layer's reference compiler, which needs no compiler of the machine."""
    options = EngineOptions("eager", "cpu", "float32", (1, 2))
    monkeypatch.setattr(loading, "_choose_engines", lambda settings, folder: [options])
    settings = make_settings(checkpoint, engines=tmp_path / "store", build_missing=False)
    caplog.set_level(logging.INFO, "rmd.server")
    model = load_on_cpu(settings)
    assert "engines are not in" in caplog.text and "Build them: rmd build" in caplog.text
    assert not any(model.card.compiled.values()) and {each.kind for each in model.baselines()} == {"eager"}
    stations = (*model.card.stations(), *model.card.preview_stations())
    low = StationKey("denoise", size=min(model.card.schedules["2+2"].cascade.sizes))

    def draw(house: House) -> dict[str, Any]:
        reply: dict[str, Any] = house.draw(seed=3, n=3).json()
        return reply

    no_jobs = lambda *_: pytest.fail("it makes pictures")  # noqa: E731
    with running(Service(settings, no_jobs, [("cpu", lambda: ThreadEngine(model))])) as house:
        eager = draw(house)
        assert set(house.client.get("/health/ready").json()["stations"].values()) == {"eager"}
        build_checkpoint(
            checkpoint=checkpoint,
            store=settings.engines,
            backend="eager",
            device="cpu",
            dtype="float32",
            buckets=(1, 2),
        )
        house.service.fleet.adopt()
        house.until(lambda: house.metric("rmd_station_compiled") == len(stations), "every station to change over")
        assert set(house.client.get("/health/ready").json()["stations"].values()) == {"compiled"}
        compiled = draw(house)
        assert set(compiled["rmd"]["teacher_seconds"]) == {"eager", "compiled"}
        entry = house.client.get("/v1/models/tiny").json()["rmd"]
        assert entry["compiled"][low.label] == [1, 2]
    for mine, reference in zip(compiled["data"], eager["data"], strict=True):
        difference = np.abs(pixels(mine["b64_json"]) - pixels(reference["b64_json"]))
        assert difference.mean() <= 1 and difference.max() <= 8
    caplog.clear()
    again = load_on_cpu(settings)
    assert "engines are not in" not in caplog.text
    assert set(again.card.compiled) == {key.label for key in stations} and all(again.card.compiled.values())
    assert again.costs.widths(low) == (1, 2, 4, 8) and {each.kind for each in again.baselines()} == {
        "eager",
        "compiled",
    }
    assert again.card.compiled["encode"] == (1,) and max(again.costs.widths(StationKey("encode"))) > 1, "by turns"

    monkeypatch.setattr(loading, "_choose_engines", lambda *_: [EngineOptions("eager", "cpu", "bfloat16", (1, 2))])
    other = load_on_cpu(settings.model_copy(update={"dtype": "bfloat16"}))
    assert not any(other.card.compiled.values())
    assert "Engines there were built for" in caplog.text and "bfloat16" in caplog.text, "it ran eager without a word"


def test_the_baseline_is_the_guided_teacher(loaded: DeviceModel) -> None:
    (baseline,) = loaded.baselines()
    assert baseline.kind == "eager" and baseline.steps == TEACHER_STEPS
    parts = baseline.encode_seconds + TEACHER_STEPS * baseline.guided_step_seconds + baseline.decode_seconds
    assert baseline.seconds == pytest.approx(parts)


def test_the_baseline_follows_the_machine_and_says_how_steady_and_old_it_is(loaded: DeviceModel) -> None:
    """Timed once at the start, one picture was reported as 22 x and as 104 x."""
    teacher = EagerTeacher(loaded.lanes[TEACHER], max(loaded.card.sizes), TEACHER_STEPS)
    assert not teacher.due, "it has just been timed"
    timings = [0.1] * 9
    teacher._timings.extend(timings)
    steady = teacher.baseline()
    assert steady.guided_step_seconds == pytest.approx(0.1) and steady.spread == pytest.approx(1.0) and steady.steady
    teacher._timings.append(30.0)
    assert teacher.baseline().guided_step_seconds == pytest.approx(0.1), "one stall moves nothing"
    teacher._timings.extend([0.3, 0.3, 0.3, 0.3])
    assert not teacher.baseline().steady
    before = time.monotonic()
    for _ in range(9):
        teacher.time_again()
    again = teacher.baseline()
    assert again.guided_step_seconds < 0.1 and again.measured >= before


def test_without_its_folder_the_teacher_is_not_offered(tmp_path: Path) -> None:
    folder = write_tiny_folder("pixart", tmp_path / "alone")
    file = folder / "cascade.json"
    file.write_text(file.read_text().replace('"folder": "."', '"folder": "../gone"'))
    model = load_on_cpu(make_settings(folder, max_batch=1))
    assert "teacher" not in model.card.schedules
    assert [baseline.kind for baseline in model.baselines()] == ["eager"], "the student has the teacher's shape"
    with serving(model, make_settings(folder)) as house:
        refused = house.draw(schedule="teacher")
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "schedule"
        assert house.draw(seed=1).status_code == 200


def test_batches_that_do_not_fit_in_memory_are_not_used(
    loaded: DeviceModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = 1

    def full(component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> None:
        if next(iter(inputs.values())).shape[0] > room:
            raise torch.OutOfMemoryError("no room")

    gate = Gate(loaded.backbone.executor)
    gate.before = full
    monkeypatch.setattr(loaded.backbone, "executor", gate)
    key = StationKey("decode", size=max(loaded.card.sizes))
    assert set(measure_station(loaded.lanes, key, max_batch=8)) == {1}
    assert f"{key.label}: no memory for a batch of 2; at most 1" in caplog.text
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        measure_station(loaded.lanes, key, max_batch=8)


def test_a_guided_step_of_the_teacher_is_timed_whatever_the_widths(loaded: DeviceModel) -> None:
    size = max(loaded.card.sizes)
    assert set(measure_station(loaded.lanes, StationKey("denoise", TEACHER, size), max_batch=1)) == {1, 2}
    assert set(measure_station(loaded.lanes, StationKey("denoise", STUDENT, size), max_batch=1)) == {1}


def test_a_backend_that_is_not_here_is_named(checkpoint: Path) -> None:
    with pytest.raises(BackendUnavailable, match="warp"):
        load_on_cpu(make_settings(checkpoint, backend="warp"))


def test_rmd_serve_says_what_is_wrong_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cli.main import app

    runner = CliRunner()
    monkeypatch.setenv("RMD_API_KEYS", "very-secret")
    arguments = ["serve", "--checkpoint", str(tmp_path / "nothing"), "--backend", "eager", "--port", "0"]
    stopped = runner.invoke(app, arguments)
    assert stopped.exit_code == 1
    assert "nothing" in stopped.output and "is not a folder" in stopped.output
    assert "1 key(s), hidden" in stopped.output and "very-secret" not in stopped.output
    wrong = runner.invoke(app, ["serve", "--queue-items", "3"])
    assert wrong.exit_code == 2 and "queue_items" in wrong.output
    assert "very-secret" not in wrong.output and "pydantic" not in wrong.output
    monkeypatch.delenv("RMD_API_KEYS")
    file = tmp_path / "serve.yaml"
    monkeypatch.setenv("RMD_CONFIG", str(file))
    file.write_text("api_keys: [8675309]\nprot: 1\n")
    wrong = runner.invoke(app, ["serve"])
    assert wrong.exit_code == 2 and "8675309" not in wrong.output
    assert "api_keys.0: Input should be a valid string" in wrong.output and "prot: Extra" in wrong.output
    file.write_text("port: [\n")
    wrong = runner.invoke(app, ["serve"])
    assert wrong.exit_code == 2 and "not valid YAML" in wrong.output


def test_a_server_decodes_with_the_decoder_that_it_is_told(checkpoint: Path, tmp_path: Path) -> None:
    name = CheckpointFolder.read(checkpoint).backbone_name
    decoder = write_tiny_decoder(name, tmp_path / "small")
    small = load_on_cpu(make_settings(checkpoint, decoder=str(decoder), max_batch=1))
    full = load_on_cpu(make_settings(checkpoint, decoder="full", max_batch=1))
    for lane, backbone in small.lanes.items():  # the teacher's pictures come through the same decoder
        size = max(small.card.sizes)
        latents = torch.randn(1, *backbone.latent_shape(size))
        with torch.no_grad():
            expected = AutoencoderTiny.from_pretrained(decoder).decode(latents).sample.mul(0.5).add(0.5).clamp(0, 1)
        assert torch.allclose(backbone.decode(latents, size), expected, atol=1e-4)
        assert not torch.allclose(full.lanes[lane].decode(latents, size), expected, atol=1e-2)


def test_a_decoder_that_does_not_fit_says_so_at_the_start(checkpoint: Path, tmp_path: Path) -> None:
    decoder = write_tiny_decoder("sdxl", tmp_path / "taesd", latent_channels=7)
    with pytest.raises(ValueError, match=r"taesd does not fit .*: latent_channels is 7, expected"):
        load_on_cpu(make_settings(checkpoint, decoder=str(decoder)))


@pytest.mark.parametrize(("component", "folder"), [("denoiser", "transformer"), ("decoder", "vae")])
def test_weights_that_draw_nan_are_refused_at_the_start(
    checkpoint: Path, tmp_path: Path, component: str, folder: str
) -> None:
    """They were served, and every picture was a 500."""
    shutil.copytree(checkpoint, tmp_path / "broken")
    record = tmp_path / "broken" / CASCADE_FILE
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "weights"}))
    file = next((tmp_path / "broken" / folder).glob("*.safetensors"))
    weights = load_file(file)
    save_file({name: torch.full_like(value, torch.nan) for name, value in weights.items()}, file)
    with pytest.raises(RuntimeError, match=f"the {component}'s output at .* holds NaN or infinity"):
        load_on_cpu(make_settings(tmp_path / "broken", measure_teacher=False, serve_teacher=False))
