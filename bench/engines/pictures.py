"""How far a picture depends on what computed it: the backend, and the batch it travelled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.subjects import Subject
from rmd.backbones.base import Backbone
from rmd.backbones.executor import EagerExecutor
from rmd.cascade import Cascade
from rmd.sampler import sample

PROMPTS = (
    "red apple", "blue fish", "yellow star", "green tree", "smiling face", "a red rocket", "two cherries", "a house",
)  # fmt: skip
TOLERANCE_LEVELS = 8


def picture_rows(
    subject: Subject, exact: Backbone, executors: Mapping[str, Any], cascade: Cascade, batches: Sequence[int]
) -> list[dict[str, Any]]:
    """The same eight prompts and seeds by every executor and in every batch, compared in 8-bit levels.

    Args:
        subject: its backbone's executor is replaced meanwhile.
        exact: the same network in float32, run eagerly: the reference.
        executors: by name.
        batches: how many pictures travel together; 1 is put in front.

    Returns:
        a row for each executor and batch: mean and largest difference and the share of values more than
        ``TOLERANCE_LEVELS`` apart, from the reference ("float32") and from the same executor at batch 1 ("alone").
    """
    exact.executor = EagerExecutor(exact.component_modules())
    reference = _draw(exact, cascade, 1)
    rows: list[dict[str, Any]] = []
    for name, executor in executors.items():
        subject.backbone.executor = executor
        alone: Tensor | None = None
        for batch in dict.fromkeys((1, *batches)):
            pictures = _draw(subject.backbone, cascade, batch)
            alone = pictures if alone is None else alone
            for other, against in (("float32", reference), ("alone", alone)):
                rows.append({"backend": name, "batch": batch, "against": other, **_difference(pictures, against)})
    return rows


def _draw(backbone: Backbone, cascade: Cascade, batch: int) -> Tensor:
    """Pictures in levels from 0 to 255, before rounding."""
    found = []
    with torch.inference_mode():
        conditioning = backbone.encode_prompts(PROMPTS)
        for start in range(0, len(PROMPTS), batch):
            rows = {key: value[start : start + batch] for key, value in conditioning.items()}
            seeds = list(range(start, min(start + batch, len(PROMPTS))))
            found.append(backbone.decode(sample(backbone, cascade, rows, seeds), cascade.full_size))
    return 255 * torch.cat(found)


def _difference(pictures: Tensor, against: Tensor) -> dict[str, float]:
    levels = (pictures - against).abs()
    return {
        "mean_levels": float(levels.mean()),
        "max_levels": float(levels.max()),
        "share_above_8": float((levels > TOLERANCE_LEVELS).double().mean()),
    }
