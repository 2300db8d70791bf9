"""`rmd import` and then `rmd generate`, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cli.main import main
from rmd.backbones.tiny import write_tiny_folder

ROOT = Path(__file__).parents[2]


def rmd(*arguments: str | Path, code: int = 0) -> str:
    """A process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


Here = Callable[..., str]


@pytest.fixture
def rmd_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Here:
    """The same entry point in this process, which has imported what another would take seconds over."""

    def call(*arguments: str | Path, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["rmd", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said, errors = capfd.readouterr()
        assert (ended.value.code or 0) == code, said + errors
        return said if code == 0 else errors

    return call


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder("sdxl", tmp_path_factory.mktemp("base") / "sdxl")


def test_an_imported_student_is_drawn(base: Path, tmp_path: Path, rmd_here: Here) -> None:
    weight = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")["mid_block.attentions.0.proj_in.weight"]
    module = "lora_unet_mid_block_attentions_0_proj_in"
    lora = tmp_path / "student: turbo.safetensors"  # a colon of its own
    state = {
        f"{module}.lora_down.weight": torch.randn(2, weight.shape[1]),
        f"{module}.lora_up.weight": torch.randn(weight.shape[0], 2),
        f"{module}.alpha": torch.tensor(2.0),
    }
    save_file(state, lora)
    out = tmp_path / "turbo"
    said = rmd_here("import", "--base", base, "--lora", f"{lora}:0.5", "--preset", "sdxl-turbo", "--out", out)
    assert said.splitlines()[-2:] == ["LoRA student: turbo.safetensors: added to 1 weights at 0.5", str(out)]
    merged = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")["mid_block.attentions.0.proj_in.weight"]
    expected = weight + 0.5 * state[f"{module}.lora_up.weight"] @ state[f"{module}.lora_down.weight"]
    assert torch.allclose(merged, expected, rtol=0, atol=1e-6)
    picture = tmp_path / "fox.png"
    rmd_here("generate", "a red fox", "--checkpoint", out, "--out", picture, "--threads", "1")
    with Image.open(picture) as drawn:
        assert drawn.size == (512, 512)


def test_errors_are_one_line(base: Path, tmp_path: Path, rmd_here: Here) -> None:
    pickled = tmp_path / "dmd2.bin"
    pickled.write_bytes(b"\x80")
    start = ("import", "--base", base, "--preset", "dmd2-sdxl", "--out", tmp_path / "out")
    said = rmd(*start, "--network", pickled, code=2)
    assert said.startswith(f"rmd: {pickled} is a pickled file") and said.count("\n") == 1
    said = rmd_here(*start, "--lora", f"{tmp_path / 'none.safetensors'}:0.5", code=2)
    assert said.startswith(f"rmd: {tmp_path / 'none.safetensors'} does not exist; give") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_said(base: Path, tmp_path: Path, rmd_here: Here) -> None:
    state = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({**state, "gate.weight": torch.ones(2)}, tmp_path / "unet.safetensors")
    out = tmp_path / "out"
    arguments = ("--base", base, "--network", tmp_path / "unet.safetensors", "--preset", "sdxl-turbo", "--out", out)
    said = rmd_here("import", *arguments, "--allow-unmatched", "--dtype", "float16")
    assert "left out: unet.safetensors: gate.weight" in said
    stored = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert json.loads((out / "cascade.json").read_text())["backbone"] == "sdxl"
