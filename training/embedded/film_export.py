"""The checkpoint folder of a film teacher: its transformer beside the embedded model's shared components."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rmd.backbones.embedded_video import EmbeddedVideoBackbone
from rmd.cascade import teacher_cascade
from rmd.cascade_file import write_cascade_json
from rmd.checkpoint import TeacherSpec
from rmd.presets import preset
from rmd.profiles import PROFILES
from training.embedded.data.motions import MOTIONS
from training.embedded.teacher_export import MODEL_INDEX, SCHEDULER_CONFIG, TeacherDefaults
from training.runtime.files import save_model, write_json

FILM_TEACHER_FOLDER = "embedded-video-teacher"
SHARED = ("vae", "text_encoder", "tokenizer")
FILM_INDEX: dict[str, Any] = {
    **MODEL_INDEX,
    "_class_name": EmbeddedVideoBackbone.__name__,
    "transformer": ["rmd.backbones.film_transformer", "FilmTransformer"],
}


def export_film_teacher(
    folder: Path, transformer: Any, model: Path, record: Mapping[str, Any] | None = None, naive: bool = False
) -> Path:
    """Writes a film teacher: the transformer in bfloat16, the shared components, its cascade, its credits.

    Args:
        folder: where to; what it holds is replaced part by part.
        transformer: the trained :class:`rmd.backbones.film_transformer.FilmTransformer`.
        model: the embedded checkpoint whose autoencoder and text encoder the films were encoded with. They are linked
            where both folders lie side by side, else copied.
        record: how it was trained; goes into ``cascade.json``.
        naive: whether to add the teacher at the student's schedule.

    Returns:
        ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_model(transformer, folder / "transformer", torch.bfloat16)
    for name in SHARED:
        place, source = folder / name, model / name
        if place.is_symlink() or place.is_dir():
            continue
        if folder.resolve().parent == model.resolve().parent:
            place.symlink_to(Path(os.path.relpath(source, folder)), target_is_directory=True)
        else:
            shutil.copytree(source, place)
    profile = PROFILES[EmbeddedVideoBackbone.profile]
    write_json(folder / "scheduler" / "scheduler_config.json", {**SCHEDULER_CONFIG, "shift": profile.flow_shift})
    write_json(folder / "model_index.json", FILM_INDEX)
    (folder / "NOTICE").write_text((model / "NOTICE").read_text())
    (folder / "README.md").write_text(film_card(record or {}))
    cascade = teacher_cascade(TeacherDefaults(EmbeddedVideoBackbone))
    cascades = {cascade.schedule_name: cascade}
    if naive:
        student = preset(profile.name)
        cascades[student.schedule_name] = student
    write_cascade_json(
        folder,
        backbone=EmbeddedVideoBackbone.name,
        cascades=cascades,
        default=cascade.schedule_name,
        teacher=TeacherSpec(profile.teacher_steps, profile.teacher_guidance, profile.flow_shift, "."),
        distillation={"method": "none", "training": dict(record or {})},
    )
    return folder


def film_card(record: Mapping[str, Any]) -> str:
    """The README of a film teacher's folder."""
    profile = PROFILES[EmbeddedVideoBackbone.profile]
    phrases = ", ".join(motion.phrases[0] for motion in MOTIONS.values())
    facts = {
        "optimiser steps": record.get("step"),
        "samples seen": record.get("samples"),
        "minutes of training": record.get("minutes"),
        "trained on": record.get("device"),
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)
    return f"""# {FILM_TEACHER_FOLDER}

The teacher of the embedded film model: pictograms that move, at 96 and 144 pixels, 9 frames at 8 a second. It was taken
on from the picture teacher over synthetic films: the same pictures, moved by rule.

- transformer: `FilmTransformer`, 18.6 million parameters, every frame's patches in one attention; velocity prediction
- text encoder and autoencoder: the embedded model's, the latter frame by frame
- sampling: {profile.teacher_steps} Euler steps, guidance {profile.teacher_guidance:g}, shift {profile.flow_shift:g}
- captions it knows: "<label>, <style> style, <motion>[ slowly| fast][, on a <colour> background]"; motions: {phrases}
{lines}

Credits and licences: see NOTICE.
"""
