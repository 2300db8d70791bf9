"""Reports are written whole or not at all; torch-free."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_report(folder: Path, stem: str, content: Mapping[str, Any], markdown: str) -> tuple[Path, Path]:
    """Write ``<stem>.json`` and ``<stem>.md``; returns their paths."""
    paths = folder / f"{stem}.json", folder / f"{stem}.md"
    write_text(paths[0], json.dumps(content, indent=1) + "\n")
    write_text(paths[1], markdown)
    return paths
