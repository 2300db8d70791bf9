"""Files of training runs: safetensors and JSON, each written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmd.published.place import replace_folder


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` atomically, making the folder."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` atomically, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file atomically, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes of one run may write the same file.
    scratch = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, scratch)
    os.replace(scratch, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file."""
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def save_model(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """``model.save_pretrained`` (safetensors) into ``folder``, replacing what was there in one rename.

    Args:
        dtype: the weights' dtype in the file; the model's own when None. ``model`` is left as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model.save_pretrained(scratch, safe_serialization=True)
        if dtype is not None:
            for file in scratch.glob("*.safetensors"):
                tensors = {
                    name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                    for name, tensor in load_file(file).items()
                }
                save_file(tensors, file, metadata={"format": "pt"})
        config = scratch / "config.json"
        if config.is_file():  # diffusers notes where a model was loaded from, which means nothing elsewhere
            content = json.loads(config.read_text())
            content.pop("_name_or_path", None)
            config.write_text(json.dumps(content, indent=2) + "\n")
        replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
