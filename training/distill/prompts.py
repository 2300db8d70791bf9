"""Prompts of a distillation: read, encoded once, drawn by row."""

from __future__ import annotations

import hashlib
import json
import random as python_random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rmd.backbones.base import Backbone
from training.distill.roles import fingerprint
from training.embedded.data.captions import GROUNDS, WHITE
from training.embedded.data.dataset import PictureSet, caption
from training.runtime.files import load_tensors, save_tensors
from training.runtime.randomness import Randomness

PLAIN_WEIGHT = 3
"""How often a picture's plain caption is drawn for each of its random variants."""


class PromptSet:
    """Encoded prompts.

    Attributes:
        texts: the distinct prompts.
        order: rows to draw from; a row that stands there twice is drawn twice as often.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tensors: dict[str, Tensor],
        uncond: dict[str, Tensor],
        order: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.texts = list(texts)
        self.order = torch.arange(len(self.texts)) if order is None else order
        self._tensors, self._uncond = tensors, uncond
        self._device = torch.device(device)

    @property
    def digest(self) -> str:
        """Of the texts and of how often each is drawn: rows of equal sets mean the same."""
        text = json.dumps([self.texts, self.order.tolist()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def draw(self, random: Randomness, count: int) -> Tensor:
        """`count` rows, int64."""
        return self.order[random.integers(len(self.order), count)]

    def conditioning(self, rows: Tensor) -> dict[str, Tensor]:
        """The conditions of these rows."""
        return {name: value[rows].to(self._device) for name, value in self._tensors.items()}

    def unconditional(self, count: int) -> dict[str, Tensor]:
        """The conditions of the negative (or empty) prompt, `count` times."""
        return {name: value.to(self._device).expand(count, *value.shape[1:]) for name, value in self._uncond.items()}


def read_prompt_file(path: Path) -> list[str]:
    """One prompt a line; empty lines and lines that start with # are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no prompt, or is no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --prompts takes a text file with one prompt a line")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a UTF-8 text file; --prompts takes one prompt a line") from None
    lines = (line.strip() for line in text.splitlines())
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def caption_prompts(data: Path, seed: int = 0, variants: int = 2) -> list[str]:
    """Captions of the training pictures, none of the held-out ones; repeated by how often each is to be drawn.

    A picture gives its plain caption `PLAIN_WEIGHT` times, `variants` random ones and one on a coloured ground.
    """
    records = [record for record in PictureSet.load(data).records if record.split == "train"]
    random = python_random.Random(seed)
    coloured = [ground for ground in GROUNDS if ground != WHITE]
    prompts: list[str] = []
    for record in records:
        prompts += [caption(record)] * PLAIN_WEIGHT
        prompts += [caption(record, random) for _ in range(variants)]
        prompts.append(caption(record, random, random.choice(coloured)))
    return prompts


def encode_prompts(
    backbone: Backbone,
    prompts: Sequence[str],
    cache: Path,
    *,
    negative: str | None = None,
    batch: int = 128,
    progress: Callable[[float], None] = lambda _share: None,
) -> PromptSet:
    """Encode the distinct prompts and the empty one, or read them from the cache folder.

    Args:
        prompts: with repetitions; how often one stands there is how often it is drawn.
        cache: folder of encoded sets, one file for each set of texts and text encoders.
        negative: what guidance contrasts with, in place of the empty prompt.
        progress: told the share that is done.
    """
    texts = list(dict.fromkeys(prompts))
    row_of = {text: row for row, text in enumerate(texts)}
    order = torch.tensor([row_of[text] for text in prompts])
    encoders = [fingerprint(m) for name, m in backbone.component_modules().items() if name.startswith("text_encoder")]
    named = [backbone.name, str(backbone.dtype), *encoders, *texts, *([f"negative: {negative}"] if negative else [])]
    key = hashlib.sha256("\n".join(named).encode()).hexdigest()[:16]
    path = cache / f"{key}.safetensors"
    if path.is_file():
        stored = load_tensors(path)
        tensors = {name.removeprefix("prompt."): t for name, t in stored.items() if name.startswith("prompt.")}
        uncond = {name.removeprefix("uncond."): t for name, t in stored.items() if name.startswith("uncond.")}
    else:
        # Where an encoder takes long prompts longer, neighbours of like length waste least.
        by_length = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        parts = []
        for start in range(0, len(texts), batch):
            encoded = backbone.encode_prompts([texts[row] for row in by_length[start : start + batch]])
            parts.append({name: value.cpu() for name, value in encoded.items()})
            progress(min(1.0, (start + batch) / len(texts)))
        place = torch.tensor(by_length).argsort()
        tensors = {name: torch.cat([part[name] for part in parts])[place] for name in parts[0]}
        contrast = backbone.encode_prompts([negative]) if negative else backbone.encode_unconditional(1)
        uncond = {name: value.cpu() for name, value in contrast.items()}
        save_tensors(
            {
                **{f"prompt.{name}": value for name, value in tensors.items()},
                **{f"uncond.{name}": value for name, value in uncond.items()},
            },
            path,
        )
    return PromptSet(texts, tensors, uncond, order, backbone.device)
