"""The networks behind the metrics, from local folders: transformers' own classes, safetensors only, no remote code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
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
_HEAD = "layers."


def load_clip(folder: Path, device: str) -> Any:
    """A CLIP network in float32, its weights under transformers' names or open_clip's.

    Raises:
        OSError: a file is missing.
        ValueError: a weight is missing or of another shape.
    """
    config = _config(CLIPConfig, folder)
    tensors = _tensors(folder)
    if is_open_clip(tensors):
        tensors = to_transformers(tensors)
    return _load(CLIPModel, device, config, tensors)


def load_vision(folder: Path, device: str) -> Any:
    """CLIP's vision tower with its projection, in float32.

    Raises:
        OSError: a file is missing.
        ValueError: a weight is missing or of another shape.
    """
    config, tensors = _config(CLIPVisionConfig, folder), _tensors(folder)
    tower = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEAD)}
    return _load(CLIPVisionModelWithProjection, device, config, tower)


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
    tensors = {name: tensor for name, tensor in _tensors(folder).items() if name.startswith(_HEAD)}
    layers: list[nn.Module] = []
    for name in sorted({name.rpartition(".")[0] for name in tensors}, key=lambda name: int(name.removeprefix(_HEAD))):
        weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
        if weight is None or bias is None or weight.shape != (len(bias), width):
            raise ValueError(f"the head's {name} has no weight and bias, or does not take {width} values")
        layer = nn.Linear(width, len(bias))
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
        width = len(bias)
    if not layers or width != 1:
        raise ValueError("the head's linear layers (layers.N) are missing, or do not end in one score")
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


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def _load(kind: Any, device: str, config: Any, tensors: Mapping[str, Tensor]) -> Any:
    try:
        model, told = kind.from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=torch.float32, output_loading_info=True
        )
    except RuntimeError as error:  # transformers has printed which
        raise ValueError("the weights have other shapes than config.json says") from error
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
    return model.to(device).eval()
