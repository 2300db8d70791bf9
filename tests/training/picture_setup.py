"""Four small pictures with their records, and a tiny autoencoder."""

from __future__ import annotations

import numpy as np
import torch

from rmd.backbones.autoencoder import EmbeddedAutoencoder
from training.embedded.data.dataset import PictureSet, Record

LABELS = ["red circle", "blue square", "dot", "line"]


def records() -> list[Record]:
    splits = ["train", "train", "unseen_pair", "unseen_concept"]
    return [
        Record(f"1f53{i}", f"1f53{i}", "noto", label, ("shape",), 8, split)  # type: ignore[arg-type]
        for i, (label, split) in enumerate(zip(LABELS, splits, strict=True))
    ]


def four_pictures() -> PictureSet:
    rgba = np.zeros((4, 128, 128, 4), np.uint8)
    rgba[..., 3] = 255
    rgba[0, 32:96, 32:96, 0] = 255
    rgba[1, :, 64:, 2] = 255
    rgba[2, 60:70, 60:70, 1] = 200
    rgba[3, :, 60:66] = 128
    return PictureSet(records(), rgba)


def tiny_autoencoder() -> EmbeddedAutoencoder:
    torch.manual_seed(0)
    return EmbeddedAutoencoder(widths=(8, 8), blocks=(1, 1))
