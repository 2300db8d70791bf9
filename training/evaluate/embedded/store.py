"""Features, computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from training.embedded.data.dataset import PictureSet
from training.evaluate.embedded.models import EvaluationSettings
from training.evaluate.embedded.rows import PictureCache, Pictures
from training.evaluate.embedded.sets import composites
from training.evaluate.shared.features import WEIGHTS_SHA256, extract_features, load_efficientnet_lite0

Report = Callable[[str, float], None]


class FeatureStore:
    """EfficientNet-Lite0 features of pictures, cached by the pictures' bytes."""

    def __init__(self, cache: PictureCache, settings: EvaluationSettings, report: Report) -> None:
        if settings.feature_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"feature_dtype {settings.feature_dtype!r} is not float32 or bfloat16")
        self.cache = cache
        self.device, self.dtype = settings.device, settings.feature_dtype
        self.report = report
        self._network: Any = None

    def of(self, pictures: Pictures) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 1280) float32."""
        digest = hashlib.sha256(pictures.tobytes()).hexdigest()
        network = {"weights": WEIGHTS_SHA256, "dtype": self.dtype}
        path = self.cache.path("features", {"pictures": digest, "shape": pictures.shape, "network": network})
        kept = self.cache.load(path)
        if kept is None:
            if self._network is None:
                self._network = load_efficientnet_lite0(device=self.device, dtype=getattr(torch, self.dtype))
            chunks: Iterator[Pictures] = (pictures[start : start + 32] for start in range(0, len(pictures), 32))
            kept = extract_features(self._network, chunks).numpy()
            self.cache.save(path, kept)
        return torch.from_numpy(kept)

    def of_set(self, pictures: PictureSet, indices: Sequence[int]) -> Tensor:
        """Features of real pictures over white, (len(indices), 1280)."""
        parts: list[Tensor] = []
        for batch in composites(pictures, indices, 256):
            parts.append(self.of(batch))
            self.report("features of the real pictures", len(parts) * 256 / max(1, len(indices)))
        return torch.cat(parts)
