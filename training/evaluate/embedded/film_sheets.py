"""Filmstrips of held-out prompts, chosen by hash: original, teacher and student below each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.embedded.data.dataset import PictureSet
from training.embedded.data.split import unit_hash
from training.evaluate.embedded.film_run import film_sets
from training.evaluate.embedded.films import Films, FilmSet, read_films
from training.evaluate.embedded.models import Models
from training.evaluate.embedded.rows import PictureCache, generate
from training.evaluate.embedded.store import Report

STRIPS, ANIMATED, COLUMNS = 24, 16, 8
ANIMATION_FILE = "films.gif"
_FILES = {
    "unseen_pair": "films-pairs.png",
    "unseen_motion": "films-motions.png",
    "unseen_concept": "films-concepts.png",
    "train": "films-train.png",
}
_FRAME, _GAP, _CAPTION, _GUTTER, _FONT = 72, 6, 20, 64, 12
_INK, _FAINT, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)
_STILL_MILLISECONDS = 900


def chosen_films(test: FilmSet, count: int) -> list[int]:
    """Places in the set of ``count`` films of distinct things, the first in the order of a hash."""
    order = sorted(range(len(test.specs)), key=lambda place: unit_hash(f"sheet:{test.prompts[place]}"))
    picked: list[int] = []
    for place in order:
        if test.targets[place] not in {test.targets[other] for other in picked} and len(picked) < count:
            picked.append(place)
    return picked


def filmstrips(rows: Sequence[tuple[str, Films]], captions: Sequence[Sequence[str]], columns: int = 2) -> Image.Image:
    """A block a prompt: its caption, and below each other every row's frames side by side.

    Args:
        rows: name and films, (N, T, H, W, 3) uint8.
        captions: for each prompt its text, and for each row what to write beside its name.
    """
    count, frames = rows[0][1].shape[:2]
    font = ImageFont.load_default(_FONT)
    width, height = _GUTTER + frames * _FRAME + 2 * _GAP, _CAPTION + len(rows) * (_FRAME + 2) + _GAP
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for place in range(count):
        left, top = place % columns * width, place // columns * height
        pen.text((left + 4, top + 2), captions[place][0].encode("latin-1", "replace").decode("latin-1"), _INK, font)
        for line, (name, films) in enumerate(rows):
            y = top + _CAPTION + line * (_FRAME + 2)
            pen.multiline_text((left + 4, y + 20), f"{name}\n{captions[place][1 + line]}", _FAINT, font)
            for number, frame in enumerate(films[place]):
                small = Image.fromarray(frame).resize((_FRAME, _FRAME), Image.Resampling.LANCZOS)
                sheet.paste(small, (left + _GUTTER + number * _FRAME, y))
    return sheet


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically, with a palette where 256 colours do not show: sheets live in git."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    # Dithering, which hides the palette in soft gradients, happens only against a palette that is given.
    palette = image.quantize(256, method=Image.Quantize.MEDIANCUT)
    image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(scratch, format="PNG", optimize=True)
    os.replace(scratch, path)


def save_animation(films: Films, path: Path, frames_per_second: int, columns: int = COLUMNS) -> None:
    """Films side by side in one endless GIF, written atomically; the last frame stands for a while.

    Args:
        films: (N, T, H, W, 3) uint8.
    """
    count, frames, height, width, _ = films.shape
    rows = -(-count // columns)
    pictures = []
    for number in range(frames):
        picture = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP), _PAPER)
        for place in range(count):
            line, column = divmod(place, columns)
            at = (_GAP + column * (width + _GAP), _GAP + line * (height + _GAP))
            picture.paste(Image.fromarray(films[place, number]), at)
        pictures.append(picture)
    # One palette for all frames, so that what stands still does not shimmer.
    palette = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures])).quantize(255)
    shown = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [1000 // frames_per_second] * (frames - 1) + [_STILL_MILLISECONDS]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    shown[0].save(scratch, format="GIF", save_all=True, append_images=shown[1:], duration=durations, loop=0)
    os.replace(scratch, path)


def draw_film_sheets(models: Models, folder: Path, report: Report) -> list[Path]:
    """Filmstrips of 24 films of every set, and the student's films of the first set as README's animation.

    Args:
        models: the settings' first seed is used, and their teacher steps.
        folder: of the files.

    Returns:
        the written files.
    """
    models.settings = replace(models.settings, limit=models.settings.limit or 3 * STRIPS)
    settings = models.settings
    pictures = PictureSet.load(settings.data)
    cache = PictureCache(settings.cache)
    rows = models.rows(settings.rows or ("teacher", f"student-{models.default}"))
    written: list[Path] = []
    for test in film_sets(models, pictures):
        places = chosen_films(test, STRIPS)
        part = test.part(places)
        strips: list[tuple[str, Films]] = [("original", part.originals)]
        read: list[list[str]] = [read_films(part.originals, part).read]
        for row in rows:
            report(f"{test.split}: {row.key}", 0.0)
            films = generate(
                models.load(row.weights), models.digest(row.weights), row.cascade, part.prompts,
                part.seeds(settings.seeds[0]), cache, batch=8,
            )  # fmt: skip
            strips.append((row.key.replace("-", "\n"), films))
            read.append(read_films(films, part).read)
        captions = [[text, *(row[place] for row in read)] for place, text in enumerate(part.prompts)]
        path = folder / _FILES[test.split]
        save_png(filmstrips(strips, captions), path)
        written.append(path)
        if len(written) == 1:
            save_animation(strips[-1][1][:ANIMATED], folder / ANIMATION_FILE, models.frames_per_second)
    return [*written, folder / ANIMATION_FILE]
