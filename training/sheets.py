"""Contact sheets while training: fixed captions of all three splits, each sample beside the real picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from rmd.backbones.base import Backbone
from rmd.cascade import teacher_cascade
from rmd.sampler import sample
from training.data.dataset import PictureSet, caption
from training.data.split import unit_hash

CAPTION_HEIGHT = 14


@dataclass(frozen=True)
class SheetPrompt:
    """A caption and the position of the picture that it describes."""

    index: int
    text: str
    split: str


def sheet_prompts(pictures: PictureSet, per_split: int = 8) -> list[SheetPrompt]:
    """The same captions on every machine: each split's pictures in the order of a hash of code and style."""
    chosen: list[SheetPrompt] = []
    for split in ("train", "unseen_pair", "unseen_concept"):
        ranked = sorted(
            pictures.indices(split),
            key=lambda i: unit_hash(f"sheet:{pictures.records[i].hexcode}:{pictures.records[i].style}"),
        )
        chosen += [SheetPrompt(i, caption(pictures.records[i]), split) for i in ranked[:per_split]]
    return chosen


def draw_teacher(backbone: Backbone, prompts: Sequence[str], steps: int = 30, seed: int = 0) -> torch.Tensor:
    """(B, 3, H, W) float32 in [0, 1]: the guided teacher at its full size, seeds ``seed`` ... ``seed + B - 1``."""
    cascade = teacher_cascade(backbone, steps)
    conditioning = backbone.encode_prompts(prompts)
    uncond = backbone.encode_unconditional(len(prompts))
    latents = sample(backbone, cascade, conditioning, range(seed, seed + len(prompts)), uncond)
    return backbone.decode(latents, cascade.full_size)


def write_sheet(
    path: Path, pictures: PictureSet, prompts: Sequence[SheetPrompt], samples: torch.Tensor, columns: int = 4
) -> None:
    """Writes a PNG atomically: a cell a prompt, the sample on the left, the real picture on the right."""
    size = samples.shape[-1]
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (columns * 2 * size, rows * (size + CAPTION_HEIGHT)), "white")
    pen = ImageDraw.Draw(sheet)
    pixels = (samples.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for n, prompt in enumerate(prompts):
        x, y = n % columns * 2 * size, n // columns * (size + CAPTION_HEIGHT)
        sheet.paste(Image.fromarray(pixels[n]), (x, y))
        sheet.paste(Image.fromarray(pictures.composite(prompt.index, size=size)), (x + size, y))
        pen.text((x + 2, y + size + 1), f"[{prompt.split}] {prompt.text}"[: 2 * size // 6], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    sheet.save(scratch, format="PNG")
    os.replace(scratch, path)
