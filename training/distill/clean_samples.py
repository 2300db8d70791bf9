"""Clean latents for the methods that train on them: of pictures that the teacher draws, or of a folder's own.

Latents below the full size are encoded from pixels reduced by area, as SwD publishes it: a resized latent is the latent
of no picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rmd.backbones.family import DiffusersBackbone
from rmd.sampler import sample
from rmd.size import Size
from rmd.upsampling import upsample
from training.distill.methods.base import CleanSamples
from training.distill.prompts import PromptSet
from training.distill.settings import DistillSettings
from training.distill.sheets import teacher_sampling
from training.distill.teacher import Teacher
from training.embedded.data.dataset import PIXELS_FILE, PictureSet, caption
from training.runtime.attention import training_attention
from training.runtime.files import load_tensors, save_tensors
from training.runtime.randomness import Randomness

METADATA = "metadata.jsonl"
_BATCH = 8  # pictures decoded or encoded at once


def clean_samples(
    teacher: Teacher,
    prompts: PromptSet,
    sizes: Sequence[Size],
    settings: DistillSettings,
    run: Path,
    say: Callable[[str], None] = lambda _text: None,
) -> CleanSamples:
    """`real_samples` clean samples with their prompts, at every size asked for; kept in the run's folder.

    Raises:
        FileNotFoundError, ValueError: `real` is no folder of pictures whose captions are among the prompts.
    """
    full = max(sizes)
    made_of = [prompts.digest, str(teacher.folder), teacher.steps, teacher.guidance_scale, settings.real]
    made_of += [*map(str, sizes), settings.seed, settings.real_samples]
    path = run / f"real-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]}.safetensors"
    if path.is_file():
        stored = load_tensors(path)
        return CleanSamples({size: stored[f"latents.{size}"] for size in sizes}, stored["rows"])
    if settings.real == "teacher":
        say(f"drawing {settings.real_samples} samples of the teacher")
        rows = prompts.draw(Randomness(settings.seed + 17), settings.real_samples)
        drawn = _teacher_latents(teacher, prompts, full, rows, settings.seed)
        if tuple(sizes) == (full,):
            latents = {full: drawn}
        else:
            latents = _encoded(_backbone(teacher), lambda at: _decoded(teacher, drawn[at], full), len(rows), sizes)
    else:
        say(f"encoding {settings.real_samples} pictures of {settings.real}")
        pictures, rows = read_pictures(Path(settings.real), prompts.texts, full)
        chosen = Randomness(settings.seed + 17).uniform(len(rows)).argsort()[: settings.real_samples]
        rows, order = rows[chosen], chosen.tolist()
        latents = _encoded(
            _backbone(teacher), lambda at: torch.stack([pictures(order[i]) for i in at]), len(order), sizes
        )
    save_tensors({"rows": rows, **{f"latents.{size}": value for size, value in latents.items()}}, path)
    return CleanSamples(latents, rows)


def _backbone(teacher: Teacher) -> DiffusersBackbone:
    if not isinstance(teacher.backbone, DiffusersBackbone):
        raise ValueError(f"{teacher.backbone.name} has no autoencoder to encode pictures with")
    return teacher.backbone


@torch.no_grad()
def _teacher_latents(
    teacher: Teacher, prompts: PromptSet, size: Size, rows: Tensor, seed: int, batch: int = 32
) -> Tensor:
    """Latents (N, C, [T], H, W) drawn by the teacher."""
    cascade = teacher_sampling(teacher.backbone, size, teacher.steps, teacher.guidance_scale)
    parts = []
    with training_attention(teacher.backbone.device.type, teacher.backbone.tokens(size)):
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            seeds = [seed + start + i for i in range(len(part))]
            uncond = prompts.unconditional(len(part))
            parts.append(sample(teacher.backbone, cascade, prompts.conditioning(part), seeds, uncond).cpu())
    return torch.cat(parts)


def _decoded(teacher: Teacher, latents: Tensor, size: Size) -> Tensor:
    return teacher.backbone.decode(latents, size).cpu()


@torch.no_grad()
def _encoded(
    backbone: DiffusersBackbone, pixels: Callable[[list[int]], Tensor], count: int, sizes: Sequence[Size]
) -> dict[Size, Tensor]:
    """Samples of the autoencoder's posterior at every size, from pixels (B, 3, [T], H, W) reduced to it by area."""
    random = Randomness(0, backbone.device)
    parts: dict[Size, list[Tensor]] = {size: [] for size in sizes}
    for start in range(0, count, _BATCH):
        full = pixels(list(range(start, min(start + _BATCH, count))))
        for size in sizes:
            reduced = upsample(full, (size.height, size.width), "area")
            noise = random.normal((len(full), *backbone.latent_shape(size)))
            parts[size].append(backbone.encode(reduced, noise).cpu())
    return {size: torch.cat(part) for size, part in parts.items()}


def read_pictures(folder: Path, texts: Sequence[str], size: Size) -> tuple[Callable[[int], Tensor], Tensor]:
    """The pictures of a folder whose captions are among the prompts.

    Args:
        folder: what `rmd data` made (its training pictures), or pictures with a `metadata.jsonl` of `file_name` and
            `text`, as Hugging Face's datasets name it.
        texts: the prompts, by row.
        size: of the pictures, scaled to cover it and cut in the middle.

    Returns:
        a function from a number to that picture, (3, H, W) in [0, 1], and the (N,) rows of their captions.

    Raises:
        FileNotFoundError: the folder is neither.
        ValueError: no caption is a prompt, or a line of the file is none.
    """
    row_of = {text: row for row, text in enumerate(texts)}
    if (folder / PIXELS_FILE).is_file():
        pictures = PictureSet.load(folder)
        captions = [(i, caption(pictures.records[i])) for i in pictures.indices("train")]
        numbers = [i for i, text in captions if text in row_of]
        rows = [row_of[text] for _, text in captions if text in row_of]

        def load(number: int) -> Tensor:
            return _fitted(Image.fromarray(pictures.composite(numbers[number])), size)
    elif (folder / METADATA).is_file():
        lines = [(folder / name, row_of[text]) for name, text in _metadata(folder / METADATA) if text in row_of]
        rows = [row for _, row in lines]

        def load(number: int) -> Tensor:
            with Image.open(lines[number][0]) as picture:
                return _fitted(picture, size)
    else:
        raise FileNotFoundError(f"real {folder}: neither a folder of `rmd data` nor pictures with a {METADATA}")
    if not rows:
        raise ValueError(f"real {folder}: no picture's caption is among the prompts; train on its captions")
    return load, torch.tensor(rows)


def _metadata(file: Path) -> list[tuple[str, str]]:
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            lines.append((str(entry["file_name"]), str(entry["text"])))
        except (json.JSONDecodeError, TypeError, KeyError):
            raise ValueError(f'{file}, line {number}: not {{"file_name": ..., "text": ...}}') from None
    return lines


def _fitted(picture: Image.Image, size: Size) -> Tensor:
    """(3, H, W) in [0, 1], scaled to cover the size and cut in the middle."""
    scale = max(size.width / picture.width, size.height / picture.height)
    width = max(round(picture.width * scale), size.width)
    height = max(round(picture.height * scale), size.height)
    resized = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size.width) // 2, (height - size.height) // 2
    cut = resized.crop((left, top, left + size.width, top + size.height))
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255
