"""Writes `cascade.json`, which makes a diffusers folder a checkpoint."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rmd.cascade import Cascade
from rmd.checkpoint import CASCADE_FILE, FORMAT, TeacherSpec
from rmd.weight_files import decoder_digests, loaded_digests


def write_cascade_json(
    folder: Path | str,
    *,
    backbone: str,
    cascades: Mapping[str, Cascade],
    default: str,
    teacher: TeacherSpec | None = None,
    distillation: Mapping[str, Any] | None = None,
    decoder: str | None = None,
) -> Path:
    """Write a folder's `cascade.json` atomically and return its path; every file that loading reads is recorded in it.

    Raises:
        ValueError: the default is not one of the cascades, or there is none.
    """
    if default not in cascades:
        raise ValueError(f"default {default!r} is not one of the schedules {', '.join(cascades) or '(none)'}")
    data: dict[str, Any] = {
        "format": FORMAT,
        "backbone": backbone,
        "default": default,
        "schedules": {name: cascade.to_dict() for name, cascade in cascades.items()},
        "teacher": None if teacher is None else asdict(teacher),
        "distillation": dict(distillation or {}),
        "weights": loaded_digests(Path(folder)),
    }
    if decoder is not None:
        data["decoder"] = decoder
        data["decoder_weights"] = decoder_digests(Path(folder) / decoder)
    path = Path(folder) / CASCADE_FILE
    content = json.dumps(data, indent=2, allow_nan=False) + "\n"
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, prefix=".cascade-", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            # Temporary files are private; the checkpoint is meant to be read by the service's own user.
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return path
