"""Prompts of a distillation: encoded once, drawn by row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rmd.backbones.base import Backbone
from training.distill.prompt_cache import PromptCache, StoredConditions
from training.runtime.randomness import Randomness


class PromptSet:
    """Encoded prompts.

    Attributes:
        texts: the distinct prompts.
        order: rows to draw from; a row that stands there twice is drawn twice as often.
    """

    def __init__(
        self,
        texts: Sequence[str],
        conditions: Mapping[str, Tensor] | StoredConditions,
        uncond: Mapping[str, Tensor],
        order: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.texts = list(texts)
        self.order = torch.arange(len(self.texts)) if order is None else order
        self._conditions, self._uncond = conditions, uncond
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
        held = self._conditions
        found = held.rows(rows) if isinstance(held, StoredConditions) else {k: v[rows] for k, v in held.items()}
        return {name: value.to(self._device) for name, value in found.items()}

    def unconditional(self, count: int) -> dict[str, Tensor]:
        """The conditions of the negative (or empty) prompt, `count` times."""
        return {name: value.to(self._device).expand(count, *value.shape[1:]) for name, value in self._uncond.items()}


def encode_prompts(
    backbone: Backbone,
    prompts: Sequence[str],
    cache: Path,
    *,
    negative: str | None = None,
    rank: int = 0,
    processes: int = 1,
    wait: Callable[[], None] = lambda: None,
    batch: int = 128,
    progress: Callable[[float], None] = lambda _share: None,
) -> PromptSet:
    """Encode the distinct prompts and the negative (or empty) one, or read them from the cache folder.

    Args:
        prompts: with repetitions; how often one stands there is how often it is drawn.
        cache: folder of encoded prompts (:class:`~training.distill.prompt_cache.PromptCache`), which runs may share.
        negative: what guidance contrasts with, in place of the empty prompt.
        rank, processes: this process encodes its part of them.
        wait: returns once every process has called it.
        progress: told the share that is done.
    """
    texts = list(dict.fromkeys(prompts))
    row_of = {text: row for row, text in enumerate(texts)}
    order = torch.tensor([row_of[text] for text in prompts])
    stored = PromptCache(cache, backbone, negative)
    stored.encode(texts, rank=rank, processes=processes, batch=batch, progress=progress)
    wait()
    conditions, uncond = stored.open(texts)
    return PromptSet(texts, conditions, uncond, order, backbone.device)


def release_text_encoders(backbone: Backbone) -> None:
    """Drop the weights of the text encoders: everything that is trained on is encoded."""
    for name, module in backbone.component_modules().items():
        if name.startswith("text_encoder"):
            module.to("meta")
