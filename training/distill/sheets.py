"""Sample sheets: the same prompts and seeds by several models, one row each."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from rmd.backbones.base import Backbone, Conditioning
from rmd.backbones.executor import EagerExecutor
from rmd.cascade import Cascade
from rmd.sampler import sample
from rmd.size import Size
from rmd.timesteps import uniform_teacher_timesteps

_MARGIN, _LABEL_HEIGHT, _LABEL_WIDTH = 4, 26, 60


def teacher_sampling(backbone: Backbone, full_size: Size, steps: int, guidance_scale: float) -> Cascade:
    """The teacher's own sampling at the full side of a cascade."""
    timesteps = uniform_teacher_timesteps(steps, backbone.flow_shift)
    return Cascade.from_steps(
        f"{backbone.name}-teacher",
        timesteps,
        [full_size] * steps,
        flow_shift=backbone.flow_shift,
        guidance_scale=guidance_scale,
    )


class _GradientFree(EagerExecutor):
    """Runs modules that go on being trained: what a sharded one gathers under inference mode would not do for that."""

    def run(self, component: str, size: Size | None, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.modules[component](**inputs)
        return output


def with_denoiser(backbone: Backbone, denoiser: nn.Module) -> Backbone:
    """The same backbone with another denoiser behind its executor."""
    other = copy.copy(backbone)
    other.executor = _GradientFree({**backbone.component_modules(), "denoiser": denoiser})
    return other


@torch.no_grad()
def draw_pictures(
    backbone: Backbone, cascade: Cascade, conditioning: Conditioning, uncond: Conditioning, seed: int = 0
) -> Tensor:
    """One picture a prompt: (N, 3, H, W) uint8; of a film, its middle frame.

    One after the other: during training there is little memory left.

    Args:
        conditioning: of N prompts.
        uncond: what guidance contrasts with, one row.
    """
    pictures = []
    for i in range(len(next(iter(conditioning.values())))):
        row = {name: value[i : i + 1] for name, value in conditioning.items()}
        latents = sample(backbone, cascade, row, [seed + i], uncond if cascade.guidance_scale != 1.0 else None)
        pixels = backbone.decode(latents, cascade.full_size)
        if pixels.ndim == 5:
            pixels = pixels[:, :, pixels.shape[2] // 2]
        pictures.append((pixels * 255).round().to(torch.uint8).cpu())
    return torch.cat(pictures)


def write_sheet(rows: Mapping[str, Tensor], prompts: Sequence[str], path: Path) -> None:
    """Write a PNG atomically: a labelled row of pictures for each model, the prompts above.

    Args:
        rows: row label -> (N, 3, H, W) uint8.
        prompts: N captions.
    """
    height, width = next(iter(rows.values())).shape[-2:]
    cell_h, cell_w = height + _MARGIN, width + _MARGIN
    sheet = Image.new("RGB", (_LABEL_WIDTH + cell_w * len(prompts), _LABEL_HEIGHT + cell_h * len(rows)), "white")
    canvas = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        words = prompt if len(prompt) <= width // 6 else prompt[: max(width // 6 - 1, 1)] + "."
        canvas.text((_LABEL_WIDTH + column * cell_w, 6), words, fill="black")
    for line, (label, pictures) in enumerate(rows.items()):
        top = _LABEL_HEIGHT + line * cell_h
        canvas.text((2, top + height // 2), label, fill="black")
        for column, picture in enumerate(pictures):
            image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(image, (_LABEL_WIDTH + column * cell_w, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    sheet.save(scratch, format="PNG")
    os.replace(scratch, path)
