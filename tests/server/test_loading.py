"""Engines built at the first start and found at the second, and the baseline of the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from engines.errors import BackendUnavailable, EngineMissing
from engines.planning import EngineOptions
from engines.runner import EngineExecutor
from rmd.backbones.tiny import write_tiny_folder
from rmd.size import Size
from server import loading
from server.core.latency import STUDENT, TEACHER, StationKey
from server.device.model import ServedModel
from server.front.service import Progress
from server.start.compiled import choose_engines
from server.start.loading import load_model
from tests.server.conftest import TEACHER_STEPS, make_settings
from tests.server.house import Gate, pixels, serving


def test_engines_are_built_at_the_first_start_and_found_at_the_second(
    checkpoint: Path, loaded: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the engine layer's reference compiler, which needs no compiler of the machine."""
    options = EngineOptions("eager", "cpu", "float32", (1, 2))
    monkeypatch.setattr(loading, "choose_engines", lambda settings, folder: options)
    settings = make_settings(checkpoint, engines=tmp_path / "store")
    seen: list[Progress] = []
    with pytest.raises(EngineMissing, match="rmd build"):
        load_model(settings.model_copy(update={"build_missing": False}), seen.append)
    model = load_model(settings, seen.append)
    assert any("building engines" in progress.text for progress in seen)
    assert isinstance(model.backbone.executor, EngineExecutor)
    assert isinstance(model.lanes["teacher"].executor, EngineExecutor)
    assert {baseline.kind for baseline in model.baselines} == {"eager", "compiled"}
    low = min(model.schedules["2+2"].cascade.sizes)
    assert model.latencies.buckets(StationKey("denoise", size=low)) == (1, 2)
    assert model.memory_bytes["denoiser"] > 0 and model.memory_bytes["teacher denoiser"] > 0

    seen.clear()
    again = load_model(settings, seen.append)
    assert not any("building engines" in progress.text for progress in seen)
    with serving(again, settings) as house:
        compiled = house.draw(seed=3, n=3).json()
    with serving(loaded, make_settings(checkpoint)) as house:
        eager = house.draw(seed=3, n=3).json()
    assert set(compiled["rmd"]["speedup"]) == {"eager", "compiled"}
    for mine, reference in zip(compiled["data"], eager["data"], strict=True):
        difference = np.abs(pixels(mine["b64_json"]) - pixels(reference["b64_json"]))
        assert difference.mean() <= 1 and difference.max() <= 8


def test_the_baseline_is_the_guided_teacher(loaded: ServedModel) -> None:
    (baseline,) = loaded.started_baselines
    assert baseline.kind == "eager" and baseline.steps == TEACHER_STEPS
    parts = baseline.encode_seconds + TEACHER_STEPS * baseline.guided_step_seconds + baseline.decode_seconds
    assert baseline.seconds == pytest.approx(parts)


def test_without_its_folder_the_teacher_is_not_offered(tmp_path: Path) -> None:
    folder = write_tiny_folder("pixart", tmp_path / "alone")
    file = folder / "cascade.json"
    file.write_text(file.read_text().replace('"folder": "."', '"folder": "../gone"'))
    model = load_model(make_settings(folder, max_batch=1), lambda progress: None)
    assert "teacher" not in model.schedules
    assert [baseline.kind for baseline in model.baselines] == ["eager"], "the student has the teacher's shape"
    with serving(model, make_settings(folder)) as house:
        refused = house.draw(schedule="teacher")
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "schedule"
        assert house.draw(seed=1).status_code == 200


def test_batches_that_do_not_fit_in_memory_are_not_used(
    loaded: ServedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = 1

    def full(component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> None:
        if next(iter(inputs.values())).shape[0] > room:
            raise torch.OutOfMemoryError("no room")

    gate = Gate(loaded.backbone.executor)
    gate.before = full
    monkeypatch.setattr(loaded.backbone, "executor", gate)
    key = StationKey("decode", size=max(loaded.sizes))
    assert set(loading._measure_station(loaded, key, max_batch=8)) == {1}
    assert f"{key.label}: no memory for a batch of 2; at most 1" in caplog.text
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        loading._measure_station(loaded, key, max_batch=8)


def test_a_guided_step_of_the_teacher_is_timed_whatever_the_widths(loaded: ServedModel) -> None:
    size = max(loaded.sizes)
    assert set(loading._measure_station(loaded, StationKey("denoise", TEACHER, size), max_batch=1)) == {1, 2}
    assert set(loading._measure_station(loaded, StationKey("denoise", STUDENT, size), max_batch=1)) == {1}


def test_a_backend_that_is_not_here_is_named(checkpoint: Path) -> None:
    from rmd.checkpoint import CheckpointFolder

    folder = CheckpointFolder.read(checkpoint)
    assert choose_engines(make_settings(checkpoint, backend="eager"), folder) is None
    with pytest.raises(BackendUnavailable, match="warp"):
        choose_engines(make_settings(checkpoint, backend="warp"), folder)


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
