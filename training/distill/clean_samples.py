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
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from rmd.backbones.family import DiffusersBackbone
from rmd.sampler import sample
from rmd.size import Size
from rmd.upsampling import upsample
from training.distill.methods.base import CleanSamples
from training.distill.prompts import PromptSet
from training.distill.settings import DistillSettings
from training.distill.sheets import teacher_sampling, with_denoiser
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
    accelerator: Accelerator | None = None,
) -> CleanSamples:
    """`real_samples` clean samples with their prompts, at every size asked for; kept in the run's folder.

    Of several processes each makes its part, all parts of one length; what a sample is does not depend on their number.

    Raises:
        FileNotFoundError, ValueError: `real` is no folder of pictures whose captions are among the prompts.
    """
    rank, count = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    wait = accelerator.wait_for_everyone if accelerator else lambda: None
    made_of = [prompts.digest, str(teacher.folder), teacher.steps, teacher.guidance_scale, settings.real]
    made_of += [*map(str, sizes), settings.seed, settings.real_samples]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    paths = [run / f"real-{key}-{part}-of-{count}.safetensors" for part in range(count)]
    made = all(path.is_file() for path in paths)
    wait()  # all have looked before any writes
    if not made:
        save_tensors(_part(teacher, prompts, sizes, settings, say, rank, count), paths[rank])
    wait()
    parts = [load_tensors(path) for path in paths]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    _, first = np.unique(whole["numbers"].numpy(), return_index=True)
    at = torch.from_numpy(first)
    return CleanSamples({size: whole[f"latents.{size}"][at] for size in sizes}, whole["rows"][at])


def _part(
    teacher: Teacher,
    prompts: PromptSet,
    sizes: Sequence[Size],
    settings: DistillSettings,
    say: Callable[[str], None],
    rank: int,
    count: int,
) -> dict[str, Tensor]:
    """One process's samples: their numbers among all (the last parts repeat the first ones), rows and latents."""
    full, random = max(sizes), Randomness(settings.seed + 17)
    if settings.real == "teacher":
        say(f"drawing {settings.real_samples} samples of the teacher")
        numbers = _numbers(settings.real_samples, rank, count)
        rows = prompts.draw(random, settings.real_samples)[numbers]
        drawn = _teacher_latents(teacher, prompts, full, rows, settings.seed + numbers, settings.teacher_batch)
        if tuple(sizes) == (full,):
            latents = {full: drawn}
        else:
            latents = _encoded(_backbone(teacher), lambda at: _decoded(teacher, drawn[at], full), numbers, sizes)
    else:
        say(f"encoding {settings.real_samples} pictures of {settings.real}")
        pictures, all_rows = read_pictures(Path(settings.real), prompts.texts, full)
        chosen = random.uniform(len(all_rows)).argsort()[: settings.real_samples]
        numbers = _numbers(len(chosen), rank, count)
        rows, order = all_rows[chosen[numbers]], chosen[numbers].tolist()
        latents = _encoded(_backbone(teacher), lambda at: torch.stack([pictures(order[i]) for i in at]), numbers, sizes)
    return {"numbers": numbers, "rows": rows, **{f"latents.{size}": value for size, value in latents.items()}}


def _numbers(total: int, rank: int, count: int) -> Tensor:
    """Each so manieth of `total` numbers, beginning anew at the end so that all processes have as many."""
    return torch.arange(rank, -(-total // count) * count, count) % total


def _backbone(teacher: Teacher) -> DiffusersBackbone:
    if not isinstance(teacher.backbone, DiffusersBackbone):
        raise ValueError(f"{teacher.backbone.name} has no autoencoder to encode pictures with")
    return teacher.backbone


@torch.no_grad()
def _teacher_latents(
    teacher: Teacher, prompts: PromptSet, size: Size, rows: Tensor, seeds: Tensor, batch: int
) -> Tensor:
    """Latents (N, C, [T], H, W) drawn by the teacher."""
    backbone = with_denoiser(teacher.backbone, teacher.backbone.component_modules()["denoiser"])
    cascade = teacher_sampling(backbone, size, teacher.steps, teacher.guidance_scale)
    parts = []
    with training_attention(backbone.device.type, backbone.tokens(size)):
        for part, own in zip(torch.split(rows, batch), torch.split(seeds, batch), strict=True):
            uncond = prompts.unconditional(len(part))
            parts.append(sample(backbone, cascade, prompts.conditioning(part), own.tolist(), uncond).cpu())
    return torch.cat(parts)


def _decoded(teacher: Teacher, latents: Tensor, size: Size) -> Tensor:
    return teacher.backbone.decode(latents, size).cpu()


@torch.no_grad()
def _encoded(
    backbone: DiffusersBackbone, pixels: Callable[[list[int]], Tensor], numbers: Tensor, sizes: Sequence[Size]
) -> dict[Size, Tensor]:
    """Samples of the autoencoder's posterior at every size, from pixels (B, 3, [T], H, W) reduced to it by area.

    Args:
        pixels: by places in `numbers`.
        numbers: of the samples, which decide their noise.
    """
    random = Randomness(0, backbone.device)

    def noise(number: int, size: Size) -> Tensor:
        random.at(0, 0, number)
        return random.normal(backbone.latent_shape(size))

    parts: dict[Size, list[Tensor]] = {size: [] for size in sizes}
    for at in torch.split(torch.arange(len(numbers)), _BATCH):
        full = pixels(at.tolist())
        for size in sizes:
            reduced = upsample(full, (size.height, size.width), "area")
            own = torch.stack([noise(number, size) for number in numbers[at].tolist()])
            parts[size].append(backbone.encode(reduced, own).cpu())
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
