"""Checkpoints of a run: one folder each, keyed by role, safetensors and JSON, whole or not there at all.

Roles whose tensors are sharded over processes lie together in `shards/`, written by each process for its part
(torch.distributed.checkpoint, in safetensors); any number of processes, or one alone, reads them back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor

from training.runtime.files import load_tensors, save_tensors, write_json

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")
_SHARDS = "shards"


def save_checkpoint(
    folder: Path,
    iteration: int,
    roles: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
    *,
    own: Mapping[str, Mapping[str, Tensor]] | None = None,
    rank: int = 0,
    wait: Callable[[], None] = lambda: None,
) -> Path:
    """Write `<folder>/step-<iteration>` in one rename, and remove all but the newest `keep`.

    Args:
        folder: of all checkpoints of the run.
        roles: tensors by role ("student", "ema", "fake", ...), the same on all processes; one file each.
        state: JSON-ready rest.
        own: roles that only this process has; names differ between processes.
        rank: this process's; the first writes what all have.
        wait: returns once every process has called it.
    """
    final = folder / f"step-{iteration:08d}"
    partial = folder / f".{final.name}-partial"
    if rank == 0:
        for stale in folder.glob(".step-*-partial"):  # of a save that was killed
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
    wait()
    sharded = {role: tensors for role, tensors in roles.items() if _any_sharded(tensors)}
    if sharded:
        flat = {f"{role}/{name}": tensor for role, tensors in sharded.items() for name, tensor in tensors.items()}
        save_distributed(flat, storage_writer=HuggingFaceStorageWriter(str(partial / _SHARDS), save_distributed=True))
    for role, tensors in (own or {}).items():
        save_tensors(tensors, partial / f"{role}.safetensors")
    wait()
    if rank == 0:
        for role, tensors in roles.items():
            if role not in sharded:
                save_tensors(tensors, partial / f"{role}.safetensors")
        write_json(
            partial / "state.json",
            {
                "format": FORMAT,
                "iteration": iteration,
                "roles": [role for role in roles if role not in sharded],
                "sharded": list(sharded),
                **state,
            },
        )
        _sync(partial)
        _replace(final, partial)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    wait()
    return final


def _any_sharded(tensors: Mapping[str, Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def _replace(final: Path, partial: Path) -> None:
    former = final.with_name(f".{final.name}-former")
    if final.exists():  # the same iteration saved again: at a run's end, or after a resumption
        shutil.rmtree(former, ignore_errors=True)
        os.replace(final, former)
    os.replace(partial, final)
    shutil.rmtree(former, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Bring the files to the disk before the rename makes them the newest checkpoint."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / "state.json").is_file())


def load_checkpoint(
    path: Path, like: Mapping[str, Mapping[str, Tensor]] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by role, and the state.

    Args:
        like: the weights of sharded roles as they are now, by role: those that they belong to (an optimiser's too) say
            how each tensor is sharded. Whole tensors by default.

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
    if state.get("sharded"):
        roles |= _load_shards(path / _SHARDS, like or {})
    return roles, state


def _load_shards(folder: Path, like: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    roles: dict[str, dict[str, Tensor]] = {}
    flat: dict[str, Tensor] = {}
    for key, stored in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        role, _, name = key.partition("/")
        weights = like.get(role, {})
        weight = weights.get(name, weights.get(name.rpartition(".")[0]))
        if weight is not None and weight.shape == stored.size:
            tensor = torch.empty_like(weight, dtype=stored.properties.dtype)
        else:
            tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        roles.setdefault(role, {})[name] = flat[key] = tensor
    alone = not any(isinstance(tensor, DTensor) for tensor in flat.values())  # whole ones may be one process's wish
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process loads alone
        load_distributed(flat, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    return roles


def load_own(path: Path, role: str) -> dict[str, Tensor]:
    """What a process wrote under a role of its own; nothing where there is none (another number of processes)."""
    file = path / f"{role}.safetensors"
    return load_tensors(file) if file.is_file() else {}
