"""Every family the whole way through engines: tiny networks of the real diffusers classes, some minutes in all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from engines.build.checkpoint import build_checkpoint
from engines.run.executor import EngineExecutor
from rmd.backbones.base import Backbone
from rmd.backbones.registry import load_checkpoint
from rmd.backbones.tiny import write_tiny_folder
from rmd.cascade import Cascade
from rmd.sampler import sample

PROMPT = "a red fox"


def draw(backbone: Backbone, cascade: Cascade) -> torch.Tensor:
    with torch.inference_mode():
        return backbone.decode(sample(backbone, cascade, backbone.encode_prompts([PROMPT]), [7]), cascade.full_size)


@pytest.mark.timeout(1800)  # engines are compiled
@pytest.mark.parametrize("name", ["sdxl", "pixart", "sd3", "wan-1.3b"])
def test_engines_draw_what_eager_draws(name: str, tmp_path: Path) -> None:
    folder, store = write_tiny_folder(name, tmp_path / "checkpoint"), tmp_path / "engines"
    build_checkpoint(folder, store, "inductor", dtype="float32", buckets=(1,))
    backbone, checkpoint = load_checkpoint(folder, dtype=torch.float32)
    cascade = checkpoint.default_cascade
    assert len(cascade.stages) == 2
    eager = draw(backbone, cascade)
    backbone.executor = EngineExecutor.open(folder, store, "inductor", dtype="float32", buckets=(1,))
    assert (draw(backbone, cascade) - eager).abs().max() < 1e-3

    out = tmp_path / ("film.mp4" if backbone.media == "video" else "picture.png")
    options = ["--checkpoint", str(folder), "--engines", str(store), "--dtype", "float32", "--buckets", "1"]
    result = CliRunner().invoke(app, ["generate", PROMPT, *options, "--batch", "1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 500
