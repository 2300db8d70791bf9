"""`rmd cascade`, through the command line's own parser."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cli.cascade import app
from cli.main import app as main
from rmd.backbones.registry import load_checkpoint
from rmd.backbones.tiny import tiny_cascades, write_tiny_decoder, write_tiny_folder
from rmd.cascade_file import write_cascade_json
from rmd.checkpoint import CheckpointFolder
from rmd.naive import naive_cascade
from rmd.presets import preset
from rmd.size import Size


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
        ["stage", "timestep", "teacher_timestep", "width", "height", "logsnr", "noise_intensity"]
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


def test_a_schedule_whose_noise_was_made_for_its_times_is_not_moved(tmp_path: Path) -> None:
    folder = write_tiny_folder("sdxl", tmp_path / "turbo")
    (folder / "cascade.json").unlink()
    assert CliRunner().invoke(app, ["write", str(folder), "--preset", "sdxl-turbo-4"]).exit_code == 0
    wrong = CliRunner().invoke(app, ["retime", str(folder), "--timesteps", "999,700,500,250"])
    assert "noise intensities, one a transition, were made for the times it has" in str(wrong.exception)


def test_presets_are_listed_with_their_sources_and_what_is_not_supported() -> None:
    run = CliRunner()
    text = run.invoke(main, ["presets"]).stdout
    for part in (
        "sdxl-lightning-8: sdxl, 0+8 at 1024x1024",
        "source: tianweiy/DMD2",
        "licence: CC BY-NC-SA 4.0: no commercial use",
        "sd3.5-medium-turbo: sd3, 0+8 at 1024x1024, guidance 1.5",
        "tdm-sdxl: no weights of TDM for SDXL are published",
        "another attention",
    ):
        assert part in text
    listed = json.loads(run.invoke(main, ["presets", "--json", "--backbone", "wan-14b"]).stdout)
    students = ["lightx2v-wan-14b", "rcm-wan-14b", "rmd-wan", "rmd-wan-shift5"]
    assert [row["name"] for row in listed["presets"]] == ["wan", *students]
    assert listed["presets"][1]["timesteps"] == [1000, 937.5, pytest.approx(2500 / 3), 625]
    wrong = run.invoke(main, ["presets", "--backbone", "flux"])
    assert "--backbone 'flux' has no presets" in str(wrong.exception)


def test_a_students_source_follows_its_steps() -> None:
    shown = show("--preset", "sdxl-turbo-4")
    assert shown["source"] == "stabilityai/sdxl-turbo"
    assert [round(step["noise_intensity"], 3) for step in shown["steps"][:3]] == [0.279, 0.395, 0.43]
    text = CliRunner().invoke(app, ["show", "--preset", "swd-sd3"]).stdout
    assert "895.9" in text and "source: yresearch/swd-medium-4-steps" in text
    assert list(show("--preset", "sdxl")) == ["steps"]


def test_a_folder_that_contradicts_a_preset_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    folder = write_tiny_folder("sdxl", tmp_path / "x0")
    (folder / "cascade.json").unlink()
    scheduler = folder / "scheduler" / "scheduler_config.json"
    plain = json.loads(scheduler.read_text())
    for preset_name, prediction, message in (
        ("sdxl-lightning-1", "epsilon", "predicts 'sample', and the scheduler says \"prediction_type\": 'epsilon'"),
        ("sdxl-lightning", "sample", "predicts 'epsilon'"),
        ("sdxl-lightning", "v_prediction", "'v_prediction'"),
        ("swd-sd3", "epsilon", "needs a SD3Transformer2DModel"),
        ("tdm-sdxl", "epsilon", "no weights of TDM for SDXL are published"),
    ):
        scheduler.write_text(json.dumps({**plain, "prediction_type": prediction}))
        wrong = CliRunner().invoke(app, ["write", str(folder), "--preset", preset_name])
        assert isinstance(wrong.exception, ValueError) and message in str(wrong.exception)
        assert not (folder / "cascade.json").exists()
    scheduler.write_text(json.dumps({**plain, "prediction_type": "sample"}))
    assert CliRunner().invoke(app, ["write", str(folder), "--preset", "sdxl-lightning-1"]).exit_code == 0
    backbone, checkpoint = load_checkpoint(folder, dtype=torch.float32)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.999], dtype=torch.float64)
    conditioning, size = backbone.encode_prompts(["a red fox"]), Size(64, 64)
    output = backbone.predict_output(x, t, conditioning, size)
    assert torch.equal(backbone.predict_x0(x, t, conditioning, size), output)
    assert checkpoint.default_cascade == preset("sdxl-lightning-1")


def test_a_preset_of_both_sizes_is_recorded_as_of_the_one_that_the_folder_has(tmp_path: Path) -> None:
    folder = write_tiny_folder("wan-1.3b", tmp_path / "wan")
    file = folder / "transformer" / "config.json"
    tiny = json.loads(file.read_text())
    for heads, backbone in ((12, "wan-1.3b"), (40, "wan-14b")):
        file.write_text(json.dumps({**tiny, "num_attention_heads": heads, "attention_head_dim": 128}))
        (folder / "cascade.json").unlink()
        assert CliRunner().invoke(app, ["write", str(folder), "--preset", "rmd-wan"]).exit_code == 0
        assert json.loads((folder / "cascade.json").read_text())["backbone"] == backbone


def test_a_naive_cascade_is_written_and_says_what_it_is(tmp_path: Path) -> None:
    folder = write_tiny_folder("sdxl", tmp_path / "dmd2")
    (folder / "cascade.json").unlink()
    arguments = ["write", str(folder), "--preset", "dmd2-sdxl", "--naive"]
    assert "--naive needs --schedule" in str(CliRunner().invoke(app, arguments).exception)
    written = CliRunner().invoke(app, [*arguments, "--schedule", "2+2"])
    assert written.exit_code == 0 and "not distilled for this schedule" in written.stdout
    checkpoint = CheckpointFolder.read(folder)
    assert checkpoint.default == "2+2" and checkpoint.default_cascade == naive_cascade("dmd2-sdxl", "2+2")
    assert checkpoint.distillation["method"] == "none" and "not distilled" in checkpoint.distillation["note"]
    assert (folder / "README.md").read_text() == f"# dmd2\n\n**Schedule 2+2: {checkpoint.default_cascade.note}.**\n"
    shown = CliRunner().invoke(app, ["show", "--preset", "dmd2-sdxl", "--schedule", "2+2", "--naive"])
    assert "not distilled for this schedule" in shown.stdout
    wrong = CliRunner().invoke(app, ["show", "--preset", "dmd2-sdxl", "--schedule", "2+2", "--naive", "--map", "none"])
    assert "--naive takes no" in str(wrong.exception)


def test_a_card_that_is_a_link_into_a_cache_stays_what_it_was(tmp_path: Path) -> None:
    folder = write_tiny_folder("sdxl", tmp_path / "dmd2")
    (folder / "cascade.json").unlink()
    (tmp_path / "blob").write_bytes("# a card \xe9".encode("latin-1"))
    (folder / "README.md").symlink_to(tmp_path / "blob")
    arguments = ["write", str(folder), "--preset", "dmd2-sdxl", "--naive", "--schedule", "2+2"]
    for _ in range(2):  # written again after cascade.json was removed, it is still said once
        assert CliRunner().invoke(app, arguments).exit_code == 0
        card = (folder / "README.md").read_bytes()
        assert card.startswith(b"# a card \xe9\n\n**Schedule 2+2: not distilled") and card.count(b"not distilled") == 1
        (folder / "cascade.json").unlink()
    assert (tmp_path / "blob").read_bytes() == b"# a card \xe9"


def test_another_decoder_is_not_recorded_as_if_it_were_the_checkpoints(tmp_path: Path) -> None:
    folder = write_tiny_folder("embedded", tmp_path / "tiny")
    decoder = write_tiny_decoder("embedded", tmp_path / "small")
    cascades = tiny_cascades("embedded")
    write_cascade_json(folder, backbone="embedded", cascades=cascades, default="2+2", decoder="../small")
    before = (folder / "cascade.json").read_bytes()
    weights = next(decoder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    arguments = ["retime", str(folder), "--timesteps", "1000,750,600,300"]
    assert weights.name in str(CliRunner().invoke(app, arguments).exception)
    shutil.rmtree(decoder)
    assert "small is not a folder; put it back" in str(CliRunner().invoke(app, arguments).exception)
    assert (folder / "cascade.json").read_bytes() == before


def test_an_imported_checkpoint_takes_a_naive_cascade_as_a_further_schedule(tmp_path: Path) -> None:
    base, out = write_tiny_folder("sdxl", tmp_path / "base"), tmp_path / "dmd2"
    imported = ["import", "--base", str(base), "--preset", "dmd2-sdxl", "--out", str(out)]
    assert CliRunner().invoke(main, imported).exit_code == 0
    before = CheckpointFolder.read(out)
    card = (out / "README.md").read_text()
    assert "not distilled" not in card
    arguments = ["write", str(out), "--naive", "--schedule", "2+2", "--preset"]
    other = CliRunner().invoke(app, [*arguments, "lcm-sdxl"])
    assert "its weights are sampled as dmd2-sdxl, not as lcm-sdxl" in str(other.exception)
    again = CliRunner().invoke(app, ["write", str(out), "--preset", "dmd2-sdxl"])
    assert "is there already; remove it to write another" in str(again.exception)
    assert CheckpointFolder.read(out) == before

    written = CliRunner().invoke(app, [*arguments, "dmd2-sdxl"])
    assert written.exit_code == 0 and "schedule 2+2 beside 0+4, not distilled for this schedule" in written.stdout
    after = CheckpointFolder.read(out)
    assert replace(after, cascades=before.cascades) == before, "the record of the import and the default stay"
    assert after.cascades == {**before.cascades, "2+2": naive_cascade("dmd2-sdxl", "2+2")}
    note = naive_cascade("dmd2-sdxl", "2+2").note
    assert (out / "README.md").read_text() == f"{card}\n**Schedule 2+2: {note}.**\n"
    twice = CliRunner().invoke(app, [*arguments, "dmd2-sdxl"])
    assert "is there already, with a schedule '2+2'" in str(twice.exception)
    (out / "unet" / "config.json").write_text((out / "unet" / "config.json").read_text() + " ")
    altered = CliRunner().invoke(app, ["write", str(out), "--naive", "--schedule", "1+3", "--preset", "dmd2-sdxl"])
    assert "unet/config.json" in str(altered.exception), "altered files are not recorded as if they were the import's"
