"""The networks behind the metrics, from local folders: transformers' own classes, safetensors only, no remote code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from training.evaluate.pictures.open_clip import is_open_clip, to_transformers

WEIGHTS = "model.safetensors"
_HEAD = re.compile(r"layers\.(\d+)\.weight")


def load_clip(folder: Path, device: str) -> Any:
    """A CLIP network in float32, its weights under transformers' names or open_clip's.

    Raises:
        OSError: a file is missing.
        ValueError: a weight is missing or of another shape.
    """
    config = _config(CLIPConfig, folder)
    path = folder / WEIGHTS
    if path.is_file() and is_open_clip(_names(path)):
        tensors = to_transformers(load_file(path))
        return _load(CLIPModel, None, device, config=config, state_dict=tensors)
    return _load(CLIPModel, folder, device, config=config)


def load_vision(folder: Path, device: str) -> Any:
    """CLIP's vision tower with its projection, in float32.

    Raises:
        OSError: a file is missing.
        ValueError: a weight is missing or of another shape.
    """
    return _load(CLIPVisionModelWithProjection, folder, device, config=_config(CLIPVisionConfig, folder))


def load_head(folder: Path, width: int, device: str) -> nn.Module:
    """The linear layers ``layers.N`` beside a vision tower, in order, with nothing between them.

    Args:
        width: of the embedding that they take.

    Raises:
        OSError: a file is missing.
        ValueError: there are none, they do not fit each other, or the folder says that a ReLU stands between them.
    """
    declared = " ".join(_config(CLIPVisionConfig, folder).architectures or ())
    if "relu" in declared.lower():
        raise ValueError(f"{declared} has a ReLU between its layers; the score is that of the linear one")
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    with safe_open(path, "pt") as file:
        numbers = sorted(int(match[1]) for name in file.keys() if (match := _HEAD.fullmatch(name)))  # noqa: SIM118
        pairs = [(file.get_tensor(f"layers.{n}.weight"), file.get_tensor(f"layers.{n}.bias")) for n in numbers]
    layers: list[nn.Module] = []
    for weight, bias in pairs:
        if weight.shape[1] != width:
            raise ValueError(f"{path}: a layer of the head takes {weight.shape[1]} values and is given {width}")
        width = weight.shape[0]
        layer = nn.Linear(weight.shape[1], width)
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if not layers or width != 1:
        raise ValueError(f"{path} holds no linear layers (layers.N.weight) that end in one score")
    return nn.Sequential(*layers).to(device, torch.float32).eval()


def load_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer.

    Raises:
        OSError: its files are missing.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(f"{folder} holds no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=77)


def load_image_processor(folder: Path, side: int) -> Any:
    """CLIP's preparation of pictures: as the folder has it, or the published one for a network of `side` px."""
    if (folder / "preprocessor_config.json").is_file():
        return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _config(kind: Any, folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} is missing")
    return kind.from_pretrained(folder, local_files_only=True)


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _load(kind: Any, folder: Path | None, device: str, **options: Any) -> Any:
    try:
        model, told = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except RuntimeError as error:  # transformers has printed which
        raise ValueError("the weights have other shapes than config.json says") from error
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
    return model.to(device).eval()
