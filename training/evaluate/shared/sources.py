"""What is measured or shown: one file a prompt and sampling seed, found in a folder or drawn by a checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from rmd.dtypes import dtype_name
from rmd.pipeline import TEACHER, CascadePipeline
from rmd.weight_files import loaded_digests
from training.embedded.data.split import unit_hash
from training.runtime.files import write_json

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FILMS = (".mp4",)
Progress = Callable[[str, float], None]
Writer = Callable[[Sequence[Image], Path], None]
"""Writes one picture (a single frame) or film to a file, whole or not at all."""


@dataclass(frozen=True)
class Source:
    """Pictures or films of the same prompts.

    Attributes:
        name: in reports.
        files: by sampling seed, one file a prompt in their order.
        made: what drew them, as far as it is known.
    """

    name: str
    files: Mapping[int, Sequence[Path]]
    made: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawing:
    """One file to be drawn."""

    prompt: str
    seed: int
    path: Path


def noise_seed(prompt: str, seed: int) -> int:
    """The seed of a prompt's noise: by the prompt and the sampling seed alone, so checkpoints share it, whatever the
    prompt's place in its file."""
    return int(unit_hash(f"{seed}:{prompt}") * 2**31)


def read_source(folder: Path, prompts: Sequence[str], suffixes: Sequence[str] = PICTURES) -> Source:
    """The files of a folder, in the order of the numbers that their names begin with: ``00000.png``, ``0001-fox.png``.

    They count the prompts from 0 or from 1. Sampling seeds are folders of their own, ``0/00000.png``; files beside
    each other are of one seed.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no such files, one too few or too many, or a name without a number.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is neither a checkpoint nor a folder of files {', '.join(suffixes)}")
    seeds = {int(entry.name): entry for entry in folder.iterdir() if entry.is_dir() and entry.name.isdecimal()}
    files = {seed: _numbered(seeds[seed], len(prompts), suffixes) for seed in sorted(seeds)}
    return Source(str(folder), files or {0: _numbered(folder, len(prompts), suffixes)})


def _numbered(folder: Path, count: int, suffixes: Sequence[str]) -> list[Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes:
            continue
        number = re.match(r"\d+", path.name)
        if number is None:
            raise ValueError(f"{path}: its name does not begin with the prompt's number, as 00000{path.suffix} does")
        if int(number[0]) in found:
            raise ValueError(f"{path} and {found[int(number[0])].name} both begin with number {int(number[0])}")
        found[int(number[0])] = path
    if not found:
        raise ValueError(f"{folder} holds no files {', '.join(suffixes)}")
    first = min(min(found), 1)
    wanted = range(first, first + count)
    if missing := [number for number in wanted if number not in found]:
        raise ValueError(f"{folder} has {len(found)} files for {count} prompts: number {missing[0]} is missing")
    if surplus := [number for number in found if number not in wanted]:
        raise ValueError(f"{found[surplus[0]]} is of no prompt: there are {count}")
    return [found[number] for number in wanted]


def draw_source(
    pipe: CascadePipeline,
    schedule: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    write: Writer,
    batch: int = 4,
    progress: Progress = lambda _what, _share: None,
) -> Source:
    """A checkpoint's pictures or films of every prompt and sampling seed, drawn where they are not there yet.

    They lie in a folder of their own below `folder`, named after what drew them, in the layout that
    :func:`read_source` reads, with a ``drawn.json`` that says what that was.
    """
    made = {**drawn_by(pipe, schedule), "prompts": prompts_digest(prompts)}
    key = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]
    checkpoint = pipe.checkpoint.path
    name = f"{checkpoint} {schedule}"
    home = folder / f"{checkpoint.resolve().name}-{schedule}-{key}"
    suffix = FILMS[0] if pipe.backbone.media == "video" else PICTURES[0]
    files = {seed: [home / str(seed) / f"{row:05d}{suffix}" for row in range(len(prompts))] for seed in seeds}
    write_json(home / "drawn.json", made)
    drawings = [
        Drawing(prompt, noise_seed(prompt, seed), path)
        for seed, paths in files.items()
        for prompt, path in zip(prompts, paths, strict=True)
    ]
    draw_missing(pipe, schedule, drawings, write, batch, lambda share: progress(name, share))
    return Source(name, files, made)


def drawn_by(pipe: CascadePipeline, schedule: str) -> dict[str, Any]:
    """What a file drawn by this checkpoint depends on beside prompt and seed: not where the checkpoint lies."""
    folder = pipe.checkpoint.teacher_path if schedule == TEACHER else pipe.checkpoint.path
    assert folder is not None
    decoder = pipe.checkpoint.decoder_path
    digests = json.dumps([loaded_digests(folder), loaded_digests(decoder) if decoder is not None else {}])
    return {
        "weights": hashlib.sha256(digests.encode()).hexdigest(),
        "dtype": dtype_name(pipe.dtype),
        "device": pipe.device.type,
        "executor": type(pipe.backbone.executor).__name__,
        "cascade": pipe.cascade(schedule).to_dict(),
    }


def prompts_digest(prompts: Sequence[str]) -> str:
    """sha256 of a list of prompts."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def draw_missing(
    pipe: CascadePipeline,
    schedule: str,
    drawings: Sequence[Drawing],
    write: Writer,
    batch: int = 4,
    progress: Callable[[float], None] = lambda _share: None,
) -> None:
    """Draws those whose files are not there yet, each written at once: a stopped run goes on where it was."""
    missing = [drawing for drawing in drawings if not drawing.path.is_file()]
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        drawn = pipe([one.prompt for one in part], schedule=schedule, seed=[one.seed for one in part])
        assert not isinstance(drawn, tuple)
        for one, frames in zip(part, drawn.frames or [[picture] for picture in drawn.images], strict=True):
            write(frames, one.path)
        progress(1 - (len(missing) - start - len(part)) / len(drawings))
