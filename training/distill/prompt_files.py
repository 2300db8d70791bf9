"""Prompts from files: text, JSON lines, parquet; and the captions of the training pictures."""

from __future__ import annotations

import json
import random as python_random
from pathlib import Path
from typing import Any

from training.embedded.data.captions import GROUNDS, WHITE
from training.embedded.data.dataset import PictureSet, caption

PLAIN_WEIGHT = 3
"""How often a picture's plain caption is drawn for each of its random variants."""


def read_prompt_file(path: Path, column: str = "prompt") -> list[str]:
    """The prompts of a file, by its suffix.

    `.jsonl`: one JSON string a line, or an object with the field `column`; `.parquet`: the column `column`; anything
    else is text, one prompt a line, where lines that start with # are left out. Empty prompts are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no prompt, is no text, or lacks the field or column.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is no file; --prompts takes a text file with one prompt a line, .jsonl or .parquet"
        )
    if path.suffix == ".parquet":
        prompts = _parquet(path, column)
    elif path.suffix == ".jsonl":
        prompts = _json_lines(path, column)
    else:
        prompts = [line for line in map(str.strip, _lines(path)) if not line.startswith("#")]
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def _lines(path: Path) -> list[str]:
    """By line feeds alone: captions and JSON strings may hold the other line ends that `splitlines` knows."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a UTF-8 text file; --prompts takes one prompt a line") from None


def _json_lines(path: Path, column: str) -> list[str]:
    prompts = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            entry: Any = json.loads(line)
        except ValueError:
            raise ValueError(f"{path}, line {number}: no JSON; give one string or object a line") from None
        value = entry.get(column) if isinstance(entry, dict) else entry
        if not isinstance(value, str):
            raise ValueError(f"{path}, line {number}: no text under {column!r}; name the field with --prompt-column")
        prompts.append(value)
    return prompts


def _parquet(path: Path, column: str) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:
        raise ValueError(f"{path}: parquet needs pyarrow (pip install 'rmd[train]'), or give .txt or .jsonl") from None
    try:
        schema = parquet.read_schema(path)
        names = list(schema.names)
        if column not in names:
            raise ValueError(f"{path} has no column {column!r}, but {', '.join(names)}; name it with --prompt-column")
        kind = schema.field(column).type
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise ValueError(f"{path}: column {column!r} holds {kind}, no text; name another with --prompt-column")
        values: list[str | None] = parquet.read_table(path, columns=[column])[column].to_pylist()
    except (ArrowException, OSError) as error:  # damaged pages are the latter
        raise ValueError(f"{path} is no parquet file, or a damaged one: {error}") from None
    return [value for value in values if value is not None]


def caption_prompts(data: Path, seed: int = 0, variants: int = 2) -> list[str]:
    """Captions of the training pictures, none of the held-out ones; repeated by how often each is to be drawn.

    A picture gives its plain caption `PLAIN_WEIGHT` times, `variants` random ones and one on a coloured ground.
    """
    records = [record for record in PictureSet.load(data).records if record.split == "train"]
    random = python_random.Random(seed)
    coloured = [ground for ground in GROUNDS if ground != WHITE]
    prompts: list[str] = []
    for record in records:
        prompts += [caption(record)] * PLAIN_WEIGHT
        prompts += [caption(record, random) for _ in range(variants)]
        prompts.append(caption(record, random, random.choice(coloured)))
    return prompts
