"""Without engines a seed draws one picture, whoever draws it: Python, the command line, and a server of any backend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rmd.backbones.base import Backbone
from rmd.backbones.registry import load_checkpoint
from rmd.backbones.tiny import write_tiny_folder
from rmd.pipeline import CascadeOutput, CascadePipeline
from server.core.stations import STUDENT
from tests.server.conftest import load_on_cpu, make_settings
from tests.server.house import pixels, serving

PROMPT = "a red rocket"
_PIPELINE = """
import json, sys
import torch
from rmd import CascadePipeline

torch.set_num_threads(1)
folder, prompt, out, seeds = sys.argv[1:]
pipe = CascadePipeline.from_pretrained(folder, torch_dtype="float32")
for seed in json.loads(seeds):
    pipe(prompt, seed=seed).images[0].save(f"{out}/{seed}.png")
"""


def _drawn(pipe: CascadePipeline, backbone: Backbone) -> torch.Tensor:
    """The picture's or film's values before they are rounded to bytes, by a backbone in the pipeline's place."""
    own, pipe.backbone = pipe.backbone, backbone
    try:
        output = pipe(PROMPT, seed=7, output_type="pt")
    finally:
        pipe.backbone = own
    assert isinstance(output, CascadeOutput)
    found: torch.Tensor = output.images if output.frames is None else output.frames
    return found


@pytest.mark.parametrize("family", ["embedded", "embedded-video", "sdxl", "wan-1.3b"])
def test_a_pipeline_draws_what_servers_draw_before_they_have_engines(family: str, tmp_path: Path) -> None:
    """To the bit, in float32: `--backend eager`, and one that waits for its engines."""
    folder = write_tiny_folder(family, tmp_path / "tiny")
    pipe = CascadePipeline.from_pretrained(folder, torch_dtype="float32")
    expected = _drawn(pipe, pipe.backbone)
    for backend in ("eager", "auto"):
        settings = make_settings(folder, backend=backend, engines=tmp_path / "none", measure_teacher=False)
        served = load_on_cpu(settings)
        assert not any(served.card.compiled.values()), "eager as yet"
        assert torch.equal(_drawn(pipe, served.lanes[STUDENT]), expected), backend


def test_fresh_processes_draw_the_servers_bytes_seed_by_seed(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder, seeds = write_tiny_folder("embedded", tmp_path / "tiny"), [5, 6, 7]
    places = tmp_path / "python", tmp_path / "generate"
    for place in places:
        place.mkdir()
    subprocess.run([sys.executable, "-c", _PIPELINE, folder, PROMPT, places[0], json.dumps(seeds)], check=True)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n" * len(seeds))
    command = [sys.executable, "-m", "cli.main", "generate", "--prompts", prompts, "--checkpoint", folder]
    options = ["--dtype", "float32", "--threads", "1", "--batch", "1", "--seed", str(seeds[0]), "--out", places[1]]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    settings = make_settings(folder, backend="auto", engines=tmp_path / "none", build_missing=False)
    with serving(load_on_cpu(settings), settings) as house:
        served = [pixels(house.draw(PROMPT, seed=seed).json()["data"][0]["b64_json"]) for seed in seeds]
    for place in places:
        files = sorted(place.iterdir())
        assert len(files) == len(seeds)
        for file, picture in zip(files, served, strict=True):
            assert np.array_equal(np.asarray(Image.open(file)), picture), file


def test_a_decoder_lies_as_its_device_runs_it(tmp_path: Path) -> None:
    """Wherever it was read; where it runs on the CPU, whatever device it comes back from."""
    folder = write_tiny_folder("sdxl", tmp_path / "tiny")
    backbone, _ = load_checkpoint(folder, dtype=torch.float32)
    decoder = backbone.component_modules()["decoder"]
    kernels = [p for p in decoder.parameters() if p.ndim == 4 and min(p.shape) > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    meta = backbone.to("meta").component_modules()["decoder"]
    assert all(p.is_contiguous() for p in meta.parameters() if p.ndim == 4)
