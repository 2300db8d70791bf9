"""A benchmark's films by a checkpoint, drawn where they are not there yet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmd.pipeline import CascadePipeline
from training.distill.prompt_files import read_prompt_file
from training.evaluate.films.layouts import LAYOUTS
from training.evaluate.shared.sources import Progress, Writer, draw_missing, drawn_by, prompts_digest
from training.runtime.files import write_json

RECORD = "films.json"


def prompt_files(path: Path) -> dict[str, list[str]]:
    """A prompts file, or every one in a folder: prompts by the file's name without its suffix.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file holds no prompts.
    """
    if not path.is_dir():
        return {path.stem: read_prompt_file(path)}
    files = sorted(path.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"{path} holds no prompts files (*.txt)")
    return {file.stem: read_prompt_file(file) for file in files}


def draw_films(
    pipe: CascadePipeline,
    schedule: str,
    layout: str,
    files: Mapping[str, Sequence[str]],
    out: Path,
    write: Writer,
    *,
    first_seed: int = 0,
    batch: int = 1,
    progress: Progress = lambda _what, _share: None,
) -> list[str]:
    """Draws the films of the prompts `files` into `out`, with a ``films.json`` that says what drew them.

    Returns:
        the folders in `out`.

    Raises:
        ValueError: the checkpoint draws pictures, an unknown layout, a prompt that cannot be a name, or `out` holds
            films of another checkpoint, seed or prompts.
    """
    if pipe.backbone.media != "video":
        raise ValueError(f"{pipe.checkpoint.path} draws pictures; give a film checkpoint, or use rmd evaluate pictures")
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not {' or '.join(LAYOUTS)}")
    drawings = {name: LAYOUTS[layout](name, prompts, out, first_seed) for name, prompts in files.items()}
    made: dict[str, Any] = {"layout": layout, "first_seed": first_seed, **drawn_by(pipe, schedule)}
    digests = {name: prompts_digest(prompts) for name, prompts in files.items()}
    _record(out / RECORD, made, digests)
    for name, part in drawings.items():
        draw_missing(pipe, schedule, part, write, batch, lambda share, name=name: progress(name, share))  # type: ignore[misc]
    return list(dict.fromkeys(one.path.parent.name for part in drawings.values() for one in part))


def _record(path: Path, made: dict[str, Any], prompts: dict[str, str]) -> None:
    """Films of one folder are of one making; other prompt files may be added to it."""
    made = json.loads(json.dumps(made))
    if path.is_file():
        there = json.loads(path.read_text())
        known = there.pop("prompts")
        other = [key for key in made if there.get(key) != made[key]]
        other += [f"prompts {name}" for name in prompts if known.get(name, prompts[name]) != prompts[name]]
        if other:
            raise ValueError(f"{path.parent} holds films of another {', '.join(other)}: give another --out")
        prompts = {**known, **prompts}
    write_json(path, {**made, "prompts": prompts})
