"""`rmd cascade`, through the command line's own parser."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.cascade import app
from rmd.backbones.tiny import tiny_cascades, write_tiny_folder
from rmd.checkpoint import CheckpointFolder, write_cascade_json
from rmd.presets import preset


def show(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["show", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def test_a_public_students_cascade_is_written_into_its_folder(tmp_path: Path) -> None:
    folder = write_tiny_folder("sdxl", tmp_path / "turbo")
    (folder / "cascade.json").unlink()
    with pytest.raises(FileNotFoundError, match="rmd cascade write --preset NAME"):
        CheckpointFolder.read(folder)
    written = CliRunner().invoke(app, ["write", str(folder), "--preset", "sdxl-turbo"])
    assert written.exit_code == 0, written.output
    checkpoint = CheckpointFolder.read(folder)
    assert checkpoint.backbone_name == "sdxl" and checkpoint.default_cascade == preset("sdxl-turbo")
    again = CliRunner().invoke(app, ["write", str(folder), "--preset", "sdxl-turbo"])
    assert isinstance(again.exception, ValueError) and "is there already" in str(again.exception)


def test_json_has_every_field() -> None:
    steps = show("--preset", "sdxl")["steps"]
    assert [list(step) for step in steps] == [
        ["stage", "timestep", "teacher_timestep", "width", "height", "logsnr"]
    ] * 4
    assert [(s["stage"], s["timestep"], s["teacher_timestep"], s["width"], s["height"]) for s in steps] == [
        (0, 1000, 1000, 512, 512),
        (0, 857, 750, 512, 512),
        (1, 500, 500, 1024, 1024),
        (1, 250, 250, 1024, 1024),
    ]
    assert steps[0]["logsnr"] is None
    assert [round(step["logsnr"], 2) for step in steps[1:3]] == [-2.82, -0.96]


def test_negative_thresholds_and_maps_are_read() -> None:
    assert [s["stage"] for s in show("--preset", "sdxl", "--thresholds", "-6,-2.5")["steps"]] == [0, 1, 2, 2]
    assert [s["stage"] for s in show("--preset", "sdxl", "--thresholds=-6")["steps"]] == [0, 1, 1, 1]
    assert show("--preset", "pixart", "--map", "logsnr")["steps"][1]["timestep"] == 836
    assert [s["stage"] for s in show("--schedule", "0+4")["steps"]] == [0, 0, 0, 0]


def test_the_table_names_the_steps() -> None:
    result = CliRunner().invoke(app, ["show", "--preset", "wan"])
    assert result.exit_code == 0
    for text in ("974", "962", "832x480x81", "1280x720x81", "-inf"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "nothing"], "unknown preset 'nothing'; the presets are sdxl"),
        (["--thresholds", "low"], "--thresholds 'low' is not a list of numbers"),
        (["--map", "up"], "resolution_map 'up'"),
    ],
)
def test_wrong_options_are_explained(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["show", *arguments])
    assert result.exit_code != 0
    assert message in str(result.exception)


def test_a_checkpoints_steps_are_moved_and_nothing_else(tmp_path: Path) -> None:
    folder = write_tiny_folder("embedded", tmp_path / "tiny")
    cascades = tiny_cascades("embedded")
    write_cascade_json(folder, backbone="embedded", cascades=cascades, default="2+2", distillation={"method": "rmd"})
    before = CheckpointFolder.read(folder)
    for arguments, message in (
        (["--timesteps", "1000,750,600"], "3 timesteps and 4 sizes"),
        (["--timesteps", "1000,750,800,300"], "must be below the step before it"),
        (["--timesteps", "1000,x"], "--timesteps '1000,x' is not a list of numbers"),
        (["--timesteps", "1000,750,600.5,300"], "the teacher's timesteps are whole numbers"),
        (["--timesteps", "1000", "--schedule", "9+9"], "--schedule '9+9' is not in"),
    ):
        wrong = CliRunner().invoke(app, ["retime", str(folder), *arguments])
        assert wrong.exit_code != 0 and message in str(wrong.exception)
    assert CheckpointFolder.read(folder) == before
    done = CliRunner().invoke(app, ["retime", str(folder), "--timesteps", "1000,750,600,300"])
    assert done.exit_code == 0 and "2+2 at 1000, 857, 600, 300" in done.stdout
    after = CheckpointFolder.read(folder)
    assert [step.teacher_timestep for step in after.default_cascade.steps] == [1000, 750, 600, 300]
    same = replace(after.default_cascade, steps=before.default_cascade.steps)
    assert replace(after, cascades={**after.cascades, "2+2": same}) == before
