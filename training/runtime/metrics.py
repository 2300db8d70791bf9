"""The metrics of a run, one JSON object a line, cut back to the checkpoint that a killed run resumes from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def cut_lines(path: Path, iteration: int, counter: str = "iteration") -> None:
    """Drop the lines whose `counter` is after `iteration`, and a last one that a kill cut short; atomic."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)[counter] <= iteration:
                kept.append(line + "\n")
        except ValueError:
            continue
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text("".join(kept), encoding="utf-8")
    os.replace(scratch, path)
