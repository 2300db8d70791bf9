"""What a checkpoint that is given as a base was made of, by the record of its own import."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rmd.checkpoint import CASCADE_FILE
from rmd.fields import read_json


def imports_of(folder: Path) -> list[dict[str, Any]]:
    """The imports that a folder came of: its own, then that of the checkpoint which was its base, and so on.

    Each as ``cascade.json`` has it in ``distillation``; a broken record says nothing.
    """
    found: list[dict[str, Any]] = []
    record = recorded(folder).get("distillation")
    while isinstance(record, dict) and _is_import(record):
        found.append(record)
        record = record["imported"]["base"].get("distillation")
    return found


def parts_of(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What one import merged: base, network and LoRAs, each with its name, licence and digests."""
    imported = record["imported"]
    yield imported["base"]
    if imported.get("network"):
        yield imported["network"]
    yield from imported["loras"]


def recorded(folder: Path) -> dict[str, Any]:
    """What a checkpoint's file says, if the folder is one; a broken one says nothing, and is not read otherwise."""
    try:
        found = read_json(folder / CASCADE_FILE)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_import(record: Mapping[str, Any]) -> bool:
    imported = record.get("imported")
    if not isinstance(record.get("preset"), str) or not isinstance(imported, dict):
        return False
    loras, network = imported.get("loras"), imported.get("network")
    if not isinstance(loras, list) or not all(isinstance(part, dict) for part in [imported.get("base"), *loras]):
        return False
    if network is not None and not isinstance(network, dict):
        return False
    said = all(
        isinstance(part.get("name"), str) and isinstance(part.get("sha256"), dict) and "licence" in part
        for part in parts_of(record)
    )
    return said and all(
        isinstance(lora.get("strength"), int | float) and isinstance(lora.get("scales"), list) for lora in loras
    )
