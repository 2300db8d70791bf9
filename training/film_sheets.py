"""Filmstrips: a film's frames in a row, under its caption."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from rmd.backbones.base import Backbone
from rmd.cascade import Cascade
from rmd.sampler import sample
from rmd.size import Size
from training.data.dataset import PictureSet
from training.data.films import FILM_SPLITS, FilmSource, FilmSpec
from training.sheets import teacher_sampling

_CAPTION_HEIGHT, _GAP = 14, 2


def held_out_films(pictures: PictureSet, each: int, seed: int = 1) -> list[FilmSpec]:
    """``each`` films of every split, the same on every machine; splits without pictures are left out."""
    films = []
    for split in FILM_SPLITS:
        if split == "unseen_motion" or pictures.indices(split):
            source = FilmSource(pictures, split, seed)
            films += [source.film(i) for i in range(each)]
    return films


@torch.no_grad()
def draw_films(backbone: Backbone, cascade: Cascade, prompts: Sequence[str], seed: int = 0, batch: int = 8) -> Tensor:
    """(N, 3, T, H, W) uint8, one film a prompt, of seeds ``seed`` to ``seed + N - 1``."""
    uncond = backbone.encode_unconditional(1) if cascade.guidance_scale != 1.0 else None
    films = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        seeds = range(seed + start, seed + start + len(part))
        latents = sample(backbone, cascade, backbone.encode_prompts(part), list(seeds), uncond)
        films.append((backbone.decode(latents, cascade.full_size) * 255).round().to(torch.uint8).cpu())
    return torch.cat(films)


def film_sampling(backbone: Backbone, size: Size, steps: int, guidance: float | None = None) -> Cascade:
    """The teacher's own way to draw, at any size."""
    return teacher_sampling(backbone, size, steps, backbone.teacher_guidance if guidance is None else guidance)


def write_filmstrips(path: Path, films: Tensor, captions: Sequence[str], columns: int = 2) -> None:
    """Writes a PNG atomically: each film's frames in a row, its caption above.

    Args:
        films: (N, 3, T, H, W) uint8.
        captions: N of them.
        columns: films beside each other.
    """
    _, _, frames, height, width = films.shape
    cell_width, cell_height = frames * width + 3 * _GAP, height + _CAPTION_HEIGHT + _GAP
    rows = -(-len(films) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), (225, 225, 225))
    pen = ImageDraw.Draw(sheet)
    for n, (film, caption) in enumerate(zip(films, captions, strict=True)):
        x, y = n % columns * cell_width, n // columns * cell_height
        pictures = film.permute(1, 2, 3, 0).contiguous().numpy()
        for t in range(frames):
            sheet.paste(Image.fromarray(pictures[t]), (x + t * width, y + _CAPTION_HEIGHT))
        pen.text((x + 2, y + 1), caption.encode("latin-1", "replace").decode("latin-1")[: frames * width // 6], "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    sheet.save(scratch, format="PNG")
    os.replace(scratch, path)
