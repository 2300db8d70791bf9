"""Seconds and peak memory of `rmd import` at a model's real shapes: random weights on disk, and a LoRA of all layers.

Needs 3 times the model's bytes on the disk (SDXL: 20 GB), and removes what it wrote.

    python scripts/measure_import.py sdxl sdxl-turbo FOLDER
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from rmd.backbones.configs import published_config
from rmd.backbones.random_weights import build_random
from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import write_tiny_folder
from rmd.published.exporting import Denoiser, write_lora
from rmd.published.factors import Factors

RANK = 64


def write_base(name: str, folder: Path) -> None:
    """A diffusers folder of the published shapes, in bfloat16; tokenizers and scheduler are the tiny variant's."""
    write_tiny_folder(name, folder)
    (folder / "cascade.json").unlink()
    config = published_config(name)
    some = torch.randn(1 << 20) / 50  # repeated: to draw billions would take longer than to import them
    for component, target in get_backbone(name).components.items():  # type: ignore[attr-defined]
        network = build_random(target, config[component], torch.bfloat16, torch.device("meta")).to_empty(device="cpu")
        for value in network.state_dict().values():
            whole, rest = divmod(value.numel(), len(some))
            value.copy_(torch.cat([*[some] * whole, some[:rest]]).reshape(value.shape))
        network.save_pretrained(folder / component, safe_serialization=True)
        del network, value
        gc.collect()


def write_student(name: str, base: Path, out: Path) -> None:
    """A LoRA of rank 64 on every linear layer and convolution, float16."""
    denoiser = Denoiser.of(name, base)
    config = published_config(name)[denoiser.component]
    target = get_backbone(name).components[denoiser.component]  # type: ignore[attr-defined]
    network = build_random(target, config, torch.float16, torch.device("meta"))
    modules = {}
    for layer in denoiser.layers:
        rows, *rest = network.get_submodule(layer).weight.shape
        down, up = torch.randn(RANK, *rest) / 100, torch.randn(rows, RANK, *(1 for _ in rest[1:])) / 100
        modules[layer] = Factors(down.half(), up.half())
    write_lora(out, modules, denoiser, "kohya", {})


def main(name: str, preset: str, where: str) -> None:
    """Write, import, measure, remove."""
    with tempfile.TemporaryDirectory(dir=where, prefix="measure-import-") as scratch:
        base, lora, out = (Path(scratch) / part for part in ("base", "lora.safetensors", "out"))
        write_base(name, base)
        write_student(name, base, lora)
        size = sum(file.stat().st_size for file in base.rglob("*") if file.is_file())
        command = ["import", "--base", base, "--lora", lora, "--preset", preset, "--out", out]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cli.main", *map(str, command)], check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        figures = {
            "base_bytes": size,
            "lora_bytes": lora.stat().st_size,
            "seconds": round(time.perf_counter() - started, 1),
            "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
            "peak_bytes": used.ru_maxrss * 1024,
        }
        print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
