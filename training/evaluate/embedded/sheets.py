"""Contact sheets of held-out prompts, chosen by hash, so that nobody can pick the pretty ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rmd.cascade import Cascade
from training.embedded.data.captions import GROUNDS
from training.embedded.data.dataset import PictureSet
from training.embedded.data.split import Split, unit_hash
from training.evaluate.embedded.film_sheets import draw_film_sheets, save_png
from training.evaluate.embedded.models import EvaluationSettings, Models
from training.evaluate.embedded.rows import PictureCache, Pictures, generate, generate_with_first_stage
from training.evaluate.embedded.sets import HeldOutSet, composites, held_out_set
from training.evaluate.embedded.store import FeatureStore
from training.evaluate.shared.metrics import unit_rows

SHEET_PROMPTS = 24
COLUMNS = 8
_CELL, _GAP, _GUTTER, _CAPTION, _FONT = 160, 6, 128, 34, 13
_INK, _FAINT, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)
_FILES = {"unseen_pair": "sheet-pairs.png", "unseen_concept": "sheet-concepts.png"}
HERO_FILE = "hero.png"

Report = Callable[[str, float], None]


def chosen(test: HeldOutSet, count: int = SHEET_PROMPTS, salt: str = "sheet") -> list[int]:
    """Places in the set of ``count`` pictures of distinct concepts, the first in the order of a hash."""
    order = sorted(
        range(len(test.records)), key=lambda i: unit_hash(f"{salt}:{test.records[i].hexcode}:{test.records[i].style}")
    )
    picked: list[int] = []
    seen: set[int] = set()
    for place in order:
        if test.targets[place] not in seen and len(picked) < count:
            seen.add(test.targets[place])
            picked.append(place)
    return picked


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Pictures] | Pictures]],
    captions: Sequence[str],
    title: str,
    columns: int = COLUMNS,
) -> Image.Image:
    """Blocks of ``columns`` prompts; in each, one line of pictures a row, its name on the left, the prompt below.

    Args:
        rows: name and one (H, W, 3) picture a prompt, of any size: all are shown alike.
        captions: one a prompt.

    Raises:
        ValueError: a row has another number of pictures.
    """
    for name, pictures in rows:
        if len(pictures) != len(captions):
            raise ValueError(f"the row {name!r} has {len(pictures)} pictures for {len(captions)} prompts")
    font, small = ImageFont.load_default(_FONT), ImageFont.load_default(_FONT - 1)
    step = _CELL + _GAP
    block = len(rows) * step + _CAPTION
    blocks = -(-len(captions) // columns)
    width, top = _GUTTER + columns * step, 30
    sheet = Image.new("RGB", (width, top + blocks * block + 4), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 8), title, fill=_INK, font=font)
    for index, text in enumerate(captions):
        left, upper = _GUTTER + (index % columns) * step, top + (index // columns) * block
        for line, (name, pictures) in enumerate(rows):
            y = upper + line * step
            if index % columns == 0:
                pen.multiline_text((8, y + _CELL // 2 - 14), _wrap(name, small, _GUTTER - 14), fill=_FAINT, font=small)
            picture = Image.fromarray(np.asarray(pictures[index]))
            if picture.size != (_CELL, _CELL):
                picture = picture.resize((_CELL, _CELL), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, y))
        wrapped = _wrap(text, small, _CELL, lines=2)
        pen.multiline_text((left, upper + len(rows) * step - 2), wrapped, fill=_INK, font=small, spacing=1)
    return sheet


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int, lines: int = 3) -> str:
    done: list[str] = []
    current = ""
    for word in text.split():
        longer = f"{current} {word}".strip()
        if current and font.getlength(longer) > width:
            done.append(current)
            current = word
        else:
            current = longer
    done.append(current)
    if len(done) > lines:
        done = [*done[: lines - 1], done[lines - 1] + " …"]
    return "\n".join(done)


def picture_grid(pictures: Sequence[Pictures], columns: int = COLUMNS, gap: int = 8) -> Image.Image:
    """Pictures side by side, nothing else."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), _PAPER)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        grid.paste(Image.fromarray(np.asarray(picture)), (gap + column * (width + gap), gap + row * (height + gap)))
    return grid


def draw_sheets(
    settings: EvaluationSettings,
    folder: Path = Path("docs"),
    report: Report = lambda _what, _share: None,
    hero_split: Split = "unseen_pair",
    hero_rows: int = 3,
) -> list[Path]:
    """Draw both contact sheets and the picture grid of README; of films, their strips and README's animation.

    Each prompt has a column: the nearest training picture to the student's sample (in EfficientNet-Lite0 features),
    the held-out original, the teacher, the student, the student's first stage at its own size, and the naive cascade.

    Args:
        settings: checkpoint, teacher, data, cache, seeds (the first is used), overrides, teacher steps.
        folder: of the PNG files.
        hero_split: whose prompts the grid shows.
        hero_rows: of eight pictures.

    Returns:
        the written files.
    """
    models = Models(settings)
    if models.media == "video":
        return draw_film_sheets(models, folder, report)
    pictures = PictureSet.load(settings.data)
    cache = PictureCache(settings.cache)
    store = FeatureStore(cache, settings, report)
    schedule = models.default
    keys = ["teacher", f"student-{schedule}", f"naive-{schedule}"]
    teacher, student, naive = models.rows(keys)
    train = pictures.indices("train")
    train_features = unit_rows(store.of_set(pictures, train))
    written: list[Path] = []
    for name, file in _FILES.items():
        test = held_out_set(pictures, name)  # type: ignore[arg-type]
        places = chosen(test)
        prompts = [test.prompts[place] for place in places]
        seeds = [test.seeds(settings.seeds[0])[place] for place in places]
        report(f"{file}: student", 0.0)
        drawn, first = generate_with_first_stage(models.load("student"), student.cascade, prompts, seeds)
        nearest = (unit_rows(store.of(drawn)) @ train_features.T).argmax(1).tolist()
        lines: list[tuple[str, Pictures]] = [
            ("nearest training picture", _composites(pictures, [train[i] for i in nearest])),
            ("held-out original", _composites(pictures, [test.indices[place] for place in places])),
        ]
        for row in (teacher, naive):
            report(f"{file}: {row.key}", 0.0)
            images = generate(models.load(row.weights), models.digest(row.weights), row.cascade, prompts, seeds, cache)
            lines.append((f"{row.key}, {row.evaluations} passes", images))
        size = student.cascade.stages[0].size
        lines[3:3] = [
            (f"RMD student {schedule}, {student.evaluations} passes", drawn),
            (f"its first stage, {size.width} px", first),
        ]
        title = f"{len(places)} {name.replace('_', ' ')}s chosen by hash, seed {settings.seeds[0]}"
        save_png(contact_sheet(lines, prompts, title), folder / file)
        written.append(folder / file)
    report(f"{HERO_FILE}", 0.0)
    save_png(_hero(models, pictures, student.cascade, settings.seeds[0], hero_split, hero_rows), folder / HERO_FILE)
    return [*written, folder / HERO_FILE]


def _composites(pictures: PictureSet, indices: Sequence[int]) -> Pictures:
    return np.concatenate(list(composites(pictures, indices)))


def _hero(models: Models, pictures: PictureSet, cascade: Cascade, seed: int, split: Split, rows: int) -> Image.Image:
    """The student's pictures of hash-chosen prompts, every third on a coloured ground that the prompt names."""
    test = held_out_set(pictures, split)
    places = chosen(test, COLUMNS * rows, "hero")
    grounds = [name for name in GROUNDS if name != "white"]
    prompts = []
    for number, place in enumerate(places):
        ground = f", on a {grounds[number // 3 % len(grounds)]} background" if number % 3 == 2 else ""
        prompts.append(test.prompts[place] + ground)
    seeds = [test.seeds(seed)[place] for place in places]
    drawn, _ = generate_with_first_stage(models.load("student"), cascade, prompts, seeds)
    return picture_grid(list(drawn))
