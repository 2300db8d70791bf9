"""`rmd import`, `rmd build`, `rmd serve` and the official client, one tiny base of each family, through engines."""

from __future__ import annotations

import base64
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from openai import OpenAI
from PIL import Image

from rmd.backbones.tiny import tiny_sizes, write_tiny_folder
from rmd.cascade_file import write_cascade_json
from rmd.checkpoint import CASCADE_FILE, CheckpointFolder
from rmd.pipeline import CascadeOutput, CascadePipeline
from rmd.published.exporting import Denoiser, write_lora
from rmd.published.factors import Factors
from rmd.published.files import WeightFiles
from rmd.size import Size

ROOT = Path(__file__).parents[1]
PROMPT = "a red fox"


def rmd(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def write_student(name: str, base: Path, out: Path) -> Path:
    """A LoRA of every layer, as somebody might publish it."""
    denoiser = Denoiser.of(name, base)
    shapes = WeightFiles.open(base / denoiser.component).shapes
    modules = {}
    for layer in denoiser.layers:
        rows, *rest = shapes[f"{layer}.weight"]
        down, up = torch.randn(2, *rest) / 20, torch.randn(rows, 2, *(1 for _ in rest[1:])) / 20
        modules[layer] = Factors(down, up)
    return write_lora(out, modules, denoiser, None, {})


def shrink(folder: Path, low: Size, full: Size) -> None:
    """The preset's steps at sides that a tiny network and a CPU can do."""
    read = CheckpointFolder.read(folder)
    own = read.default_cascade
    sizes = [full if step.size == own.full_size else low for step in own.steps]
    steps = tuple(
        replace(step, size=size, stage=int(len(set(sizes)) > 1 and size == full))
        for step, size in zip(own.steps, sizes, strict=True)
    )
    small = replace(own, steps=steps, full_size=full)
    (folder / CASCADE_FILE).unlink()
    write_cascade_json(
        folder,
        backbone=read.backbone_name,
        cascades={read.default: small},
        default=read.default,
        distillation=read.distillation,
    )


@contextmanager
def serving(*arguments: str | Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cli.main", "serve", *map(str, arguments), "--port", str(port), "--no-build"]
    environment = {**os.environ, "RMD_LOG_LEVEL": "error", "RMD_DTYPE": "float32", "RMD_BUCKETS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                assert server.poll() is None, "the server ended"
                try:
                    if httpx.get(f"{url}/health/ready", timeout=5).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait(60)


@pytest.mark.timeout(1800)  # engines are compiled
@pytest.mark.parametrize(
    ("name", "preset"),
    [("sdxl", "lcm-sdxl"), ("pixart", "pixart-lcm"), ("sd3", "swd-sd3"), ("wan-1.3b", "causvid-wan-1.3b")],
)
def test_a_published_student_is_imported_built_served_and_asked_for(name: str, preset: str, tmp_path: Path) -> None:
    base = write_tiny_folder(name, tmp_path / "base")
    lora = write_student(name, base, tmp_path / ("lora" if name == "pixart" else "lora.safetensors"))
    out, store = tmp_path / "student", tmp_path / "engines"
    rmd("import", "--base", base, "--lora", lora, "--preset", preset, "--out", out)
    shrink(out, *tiny_sizes(name))
    rmd(
        "build",
        "--checkpoint",
        out,
        "--engines",
        store,
        "--backend",
        "inductor",
        "--dtype",
        "float32",
        "--buckets",
        "1",
        "--threads",
        "1",
    )
    torch.set_num_threads(1)  # engines are of a number of threads
    pipe = CascadePipeline.from_pretrained(
        out, torch_dtype=torch.float32, engines=store, backend="inductor", buckets=(1,)
    )
    expected = pipe(PROMPT, seed=7)
    assert isinstance(expected, CascadeOutput)
    options = ("--checkpoint", out, "--engines", store, "--backend", "inductor", "--threads", "1")
    with serving(*options) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=120)
        stations = httpx.get(f"{url}/health/ready").json()
        assert "eager" not in str(stations.get("stations", stations)), stations
        if name == "wan-1.3b":
            job = client.videos.create_and_poll(prompt=PROMPT, extra_body={"seed": 7}, poll_interval_ms=100)
            assert job.status == "completed"
            assert len(client.videos.download_content(job.id).read()) > 500
            return
        reply = client.images.generate(prompt=PROMPT, extra_body={"seed": 7})
        assert reply.data is not None
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json or ""))))
    assert np.abs(picture.astype(int) - np.asarray(expected.images[0]).astype(int)).max() <= 1
