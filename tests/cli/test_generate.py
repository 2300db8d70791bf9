"""`rmd generate` and `rmd backbones list`, on tiny folders."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import av
import pytest
import torch
import typer
from diffusers import AutoencoderTiny
from PIL import Image
from typer.testing import CliRunner, Result

from rmd.backbones.registry import load_checkpoint
from rmd.backbones.tiny import write_tiny_decoder, write_tiny_folder
from rmd.dtypes import native_dtype
from rmd.sampler import sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder("sd3", tmp_path_factory.mktemp("tiny") / "sd3")


def _run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(importlib.import_module("cli.generate").command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_one_prompt_is_the_offline_sampler(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "fox.png"
    result = _run("a red fox", "--checkpoint", folder, "--seed", "5", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(out)
    backbone, checkpoint = load_checkpoint(folder, dtype=native_dtype("cpu"))
    cascade = checkpoint.default_cascade
    latents = sample(backbone, cascade, backbone.encode_prompts(["a red fox"]), [5])
    expected = backbone.decode(latents, cascade.full_size)[0].mul(255).round().byte().permute(1, 2, 0)
    with Image.open(out) as picture:
        assert picture.size == (64, 64)
        assert picture.tobytes() == expected.contiguous().numpy().tobytes()


def test_a_file_in_the_folders_place_is_refused_before_anything_is_drawn(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    result = _run("a red fox", "--checkpoint", folder, "--out", tmp_path / "taken")
    assert isinstance(result.exception, ValueError) and "is a file: give a .png name" in str(result.exception)


def test_file_of_prompts_numbers_and_seeds(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# three\na red fox\n\nAn old lighthouse!\na ship\n")
    out = tmp_path / "many"
    result = _run("--prompts", file, "--checkpoint", folder, "--seed", "5", "--batch", "2", "--out", out)
    assert result.exit_code == 0, result.output
    names = ["0000-a-red-fox.png", "0001-an-old-lighthouse.png", "0002-a-ship.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    # the third prompt alone with its own seed: the same picture, whatever it was batched with
    alone = tmp_path / "ship.png"
    assert _run("a ship", "--checkpoint", folder, "--seed", "7", "--out", alone).exit_code == 0
    with Image.open(alone) as one, Image.open(out / names[2]) as other:
        levels = zip(one.tobytes(), other.tobytes(), strict=True)
        assert max(abs(a - b) for a, b in levels) <= 1


def test_sheet_of_schedules_and_teacher(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red fox\nan old lighthouse\n")
    out = tmp_path / "sheet.png"
    # the teacher's forty guided steps would take long; four will do
    copy = tmp_path / "few"
    shutil.copytree(folder, copy)
    record = json.loads((copy / "cascade.json").read_text())
    record["teacher"]["steps"] = 4
    record["schedules"]["0+4"]["note"] = "not distilled for this schedule"
    (copy / "cascade.json").write_text(json.dumps(record))
    schedules = ["--schedule", "2+2", "--schedule", "0+4", "--schedule", "teacher"]
    result = _run("--prompts", file, "--checkpoint", copy, *schedules, "--sheet", "--out", out)
    assert result.exit_code == 0, result.output
    assert "schedule 0+4: not distilled for this schedule" in result.output and "schedule 2+2" not in result.output
    with Image.open(out) as picture:
        assert picture.size == (3 * 68 + 4, 16 + 2 * (64 + 16 + 4) + 4)
        tiles = {picture.crop((4 + 68 * k, 32, 68 + 68 * k, 96)).tobytes() for k in range(3)}
    assert len(tiles) == 3
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_film(tmp_path: Path) -> None:
    folder = write_tiny_folder("wan-1.3b", tmp_path / "wan")
    out = tmp_path / "fox.mp4"
    result = _run("a red fox", "--checkpoint", folder, "--out", out)
    assert result.exit_code == 0, result.output
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate == 16 and stream.codec_context.name == "h264"
    assert len(frames) == 5 and frames[0].shape == (48, 48, 3)


@pytest.mark.parametrize("name", ["sdxl", "pixart", "sd3", "embedded"])
def test_every_picture_family_through_a_small_decoder(tmp_path: Path, name: str) -> None:
    folder = write_tiny_folder(name, tmp_path / name)
    decoder = write_tiny_decoder(name, tmp_path / "small")
    drawn = {}
    for label, options in {"named": [], "small": ["--decoder", decoder], "full": ["--decoder", "full"]}.items():
        out = tmp_path / f"{label}.png"
        result = _run("a red fox", "--checkpoint", folder, *options, "--out", out)
        assert result.exit_code == 0, result.output
        with Image.open(out) as picture:
            assert picture.size == (64, 64)
            drawn[label] = picture.tobytes()
    assert drawn["named"] == drawn["full"] != drawn["small"]
    backbone, checkpoint = load_checkpoint(folder, dtype=torch.float32, decoder=decoder)
    cascade = checkpoint.default_cascade
    latents = sample(backbone, cascade, backbone.encode_prompts(["a red fox"]), [0])
    with torch.no_grad():
        pixels = AutoencoderTiny.from_pretrained(decoder).decode(latents).sample[0] / 2 + 0.5
    expected = pixels.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).contiguous().numpy().tobytes()
    assert max(abs(a - b) for a, b in zip(drawn["small"], expected, strict=True)) <= 1


def test_a_decoder_of_other_latents_is_named(folder: Path, tmp_path: Path) -> None:
    decoder = write_tiny_decoder("sdxl", tmp_path / "taesdxl")
    result = _run("a red fox", "--checkpoint", folder, "--decoder", decoder, "--out", tmp_path / "fox.png")
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == f"the decoder {decoder} does not fit sd3: latent_channels is 4, expected 16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either one prompt"),
        (["fox", "--prompts", "x.txt"], "give either one prompt"),
        (["--prompts", "absent.txt"], "absent.txt is no file"),
        (["fox", "--schedule", "9+9"], r"schedule '9\+9' is not in .*: 2\+2, 0\+4, teacher"),
        (["fox", "--dtype", "int8"], "dtype 'int8': use auto, bfloat16"),
        (["fox", "--backend", "inductor"], "needs --engines FOLDER"),
        (["fox", "--out", "fox.jpg"], "this makes a .png file"),
        (["fox", "--schedule", "2+2", "--schedule", "0+4", "--out", "fox.png"], "give a folder, or --sheet"),
    ],
)
def test_bad_input(folder: Path, arguments: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        result = _run(*arguments, "--checkpoint", folder)
        assert result.exception is not None
        raise result.exception


def test_engines_that_are_not_built(folder: Path, tmp_path: Path) -> None:
    result = _run("fox", "--checkpoint", folder, "--engines", tmp_path / "none", "--out", tmp_path / "fox.png")
    assert result.exit_code != 0
    assert "rmd build" in str(result.exception)
    assert not (tmp_path / "fox.png").exists()


def test_list_backbones() -> None:
    result = CliRunner().invoke(importlib.import_module("cli.backbones").app, ["list", "--json"])
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.output)}
    assert {"sdxl", "pixart", "sd3", "wan-1.3b", "wan-14b"} <= set(rows)
    sd3 = rows["sd3"]
    assert sd3["denoiser_parameters"] == 2_243_171_520
    assert sd3["teacher"] == {"steps": 40, "guidance_scale": 4.5, "flow_shift": 3.0, "size": "1024x1024"}
    assert sd3["cascade"]["schedule"] == "2+2"
    assert [step["timestep"] for step in sd3["cascade"]["steps"]] == [1000, 947, 750, 500]
    assert sd3["tokens_per_stage"] == [1024, 4096]
    assert rows["wan-14b"]["tokens_per_stage"] == [32_760, 75_600]
