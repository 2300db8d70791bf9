"""Checkpoints of a run: one folder each, keyed by role, safetensors and JSON, whole or not there at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from training.runtime.files import load_tensors, save_tensors, write_json

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")


def save_checkpoint(
    folder: Path, iteration: int, roles: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write `<folder>/step-<iteration>` in one rename, and remove all but the newest `keep`.

    Args:
        folder: of all checkpoints of the run.
        roles: tensors by role ("student", "ema", "fake", ...); one file each.
        state: JSON-ready rest.
    """
    final = folder / f"step-{iteration:08d}"
    partial = folder / f".{final.name}-partial"
    for stale in folder.glob(".step-*-partial"):  # of a save that was killed
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    for role, tensors in roles.items():
        save_tensors(tensors, partial / f"{role}.safetensors")
    write_json(partial / "state.json", {"format": FORMAT, "iteration": iteration, "roles": list(roles), **state})
    _sync(partial)
    former = folder / f".{final.name}-former"
    if final.exists():  # the same iteration saved again: at a run's end, or after a resumption
        shutil.rmtree(former, ignore_errors=True)
        os.replace(final, former)
    os.replace(partial, final)
    shutil.rmtree(former, ignore_errors=True)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def _sync(folder: Path) -> None:
    """Bring the files to the disk before the rename makes them the newest checkpoint."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / "state.json").is_file())


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by role, and the state.

    Raises:
        ValueError: another format, or a role's file is missing.
    """
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise ValueError(f"{path}: format {state.get('format')!r} is not {FORMAT}; resume it with a matching version")
    roles = {}
    for role in state["roles"]:
        file = path / f"{role}.safetensors"
        if not file.is_file():
            raise ValueError(f"{path} lacks {file.name}; remove this checkpoint to resume from the one before")
        roles[role] = load_tensors(file)
    return roles, state
