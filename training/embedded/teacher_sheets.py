"""The teacher's contact sheet: fixed captions of all three splits, each sample beside the real picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from rmd.backbones.base import Backbone
from training.distill.sheets import draw_pictures, teacher_sampling
from training.embedded.data.dataset import PictureSet, caption
from training.embedded.data.split import Split, unit_hash

CAPTION_HEIGHT = 14
SPLITS: tuple[Split, ...] = ("train", "unseen_pair", "unseen_concept")


@dataclass(frozen=True)
class SheetPrompt:
    """A caption and the position of the picture that it describes."""

    index: int
    text: str
    split: Split


def sheet_prompts(pictures: PictureSet, per_split: int = 8) -> list[SheetPrompt]:
    """The same captions on every machine: each split's pictures in the order of a hash of code and style."""
    chosen: list[SheetPrompt] = []
    for split in SPLITS:
        ranked = sorted(
            pictures.indices(split),
            key=lambda i: unit_hash(f"sheet:{pictures.records[i].hexcode}:{pictures.records[i].style}"),
        )
        chosen += [SheetPrompt(i, caption(pictures.records[i]), split) for i in ranked[:per_split]]
    return chosen


def draw_teacher(backbone: Backbone, prompts: Sequence[str], steps: int = 30, seed: int = 0) -> Tensor:
    """(N, 3, H, W) uint8: the guided teacher at its full size, seeds ``seed`` to ``seed + N - 1``."""
    cascade = teacher_sampling(backbone, backbone.full_size, steps, backbone.teacher_guidance)
    conditioning, uncond = backbone.encode_prompts(prompts), backbone.encode_unconditional(1)
    return draw_pictures(backbone, cascade, conditioning, uncond, seed)


def write_teacher_sheet(
    path: Path, pictures: PictureSet, prompts: Sequence[SheetPrompt], samples: Tensor, columns: int = 4
) -> None:
    """Writes a PNG atomically: a cell a prompt, the sample on the left, the real picture on the right.

    Args:
        samples: (N, 3, H, W) uint8, one a prompt.
    """
    size = samples.shape[-1]
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (columns * 2 * size, rows * (size + CAPTION_HEIGHT)), "white")
    pen = ImageDraw.Draw(sheet)
    for n, prompt in enumerate(prompts):
        x, y = n % columns * 2 * size, n // columns * (size + CAPTION_HEIGHT)
        sheet.paste(Image.fromarray(samples[n].permute(1, 2, 0).contiguous().numpy()), (x, y))
        sheet.paste(Image.fromarray(pictures.composite(prompt.index, size=size)), (x + size, y))
        pen.text((x + 2, y + size + 1), f"[{prompt.split}] {prompt.text}"[: max(2 * size // 6, 1)], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    sheet.save(scratch, format="PNG")
    os.replace(scratch, path)
