"""What a small decoder costs: how far its pictures are from the full decoder's, and how much sooner they are there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rmd.backbones.base import weights_dtype
from rmd.size import Size
from training.evaluate.shared.features import EfficientNetLite0, extract_features
from training.evaluate.shared.metrics import kid

_BATCH = 16
_REPEATS = 15

Decode = Callable[[Tensor], Tensor]


def decoder_of(module: nn.Module) -> Decode:
    """A decoder component as a function: latents in any dtype to pictures in [0, 1], float32 on the CPU."""
    dtype = weights_dtype(module)
    device = next(module.parameters()).device

    def decode(latents: Tensor) -> Tensor:
        with torch.inference_mode():
            pixels: Tensor = module(latents.to(device, dtype))
            return pixels.float().mul(0.5).add(0.5).clamp(0, 1).cpu()

    return decode


def decibels(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, dB, for values in [0, 1]; (B,)."""
    return -10 * torch.log10((a - b).square().mean((1, 2, 3)).clamp_min(1e-8))


def compare(
    full: nn.Module,
    small: nn.Module,
    latents: Mapping[Size, Tensor],
    features: EfficientNetLite0 | None = None,
    noise: float = 0.0,
) -> dict[str, dict[str, Any]]:
    """The small decoder against the full one, on the same latents.

    Args:
        full, small: decoder components.
        latents: by size, (N, C, H, W); those that the small one was not trained on.
        features: EfficientNet-Lite0, or None to leave its figures out.
        noise: standard deviation of the noise that latents are decoded with once more.

    Returns:
        size -> "pictures", "psnr", "psnr_worst_twentieth" in dB, "mean_error" in levels of 255, with noise
        "psnr_noised", and with ``features``, at the largest size, "features_relative_l2" (distance of a picture's
        features over the spread of the set's) and "kid_x1000" with its deviation.
    """
    decode_full, decode_small = decoder_of(full), decoder_of(small)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, Any]] = {}
    for size, stored in latents.items():
        ratios, noised, errors = [], [], []
        pictures: dict[str, list[NDArray[np.uint8]]] = {"full": [], "small": []}
        for z in torch.split(stored.float(), _BATCH):
            a, b = decode_full(z), decode_small(z)
            ratios.append(decibels(a, b))
            errors.append((a - b).abs().mean((1, 2, 3)))
            for name, drawn in (("full", a), ("small", b)):
                pictures[name].append((drawn * 255 + 0.5).byte().permute(0, 2, 3, 1).contiguous().numpy())
            if noise:
                z = z + noise * torch.randn(z.shape, generator=generator)
                noised.append(decibels(decode_full(z), decode_small(z)))
        ratio = torch.cat(ratios)
        worst = ratio.sort().values[: max(1, len(ratio) // 20)]
        entry: dict[str, Any] = {
            "pictures": len(ratio),
            "psnr": _rounded(ratio.mean()),
            "psnr_worst_twentieth": _rounded(worst.mean()),
            "mean_error": _rounded(255 * torch.cat(errors).mean()),
        }
        if noised:
            entry["psnr_noised"] = _rounded(torch.cat(noised).mean())
        if features is not None and size == max(latents) and len(ratio) > 3:
            entry |= _feature_figures(features, pictures)
        found[str(size)] = entry
    return found


def _feature_figures(features: EfficientNetLite0, pictures: Mapping[str, list[NDArray[np.uint8]]]) -> dict[str, Any]:
    def batches(name: str) -> Iterator[NDArray[np.uint8]]:
        return iter(pictures[name])

    a, b = (extract_features(features, batches(name)) for name in ("full", "small"))
    distance = kid(a, b)
    spread = (a - a.mean(0)).norm(dim=1).mean()
    return {
        "features_relative_l2": _rounded((a - b).norm(dim=1).mean() / spread, 4),
        "kid_x1000": [round(distance.value, 2), round(distance.deviation, 2)],
    }


def seconds(full: nn.Module, small: nn.Module, shape: tuple[int, ...]) -> dict[str, float]:
    """Medians of one picture's decoding, the two turn by turn on the present threads.

    Args:
        shape: of one latent, without batch.

    Returns:
        "full" and "small" in seconds, "ratio" of the first over the second.
    """
    decoders = {"full": decoder_of(full), "small": decoder_of(small)}
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    spent: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(_REPEATS + 2):
        for name, decode in decoders.items():
            started = time.perf_counter()
            decode(latents)  # ends on the CPU: a GPU is waited for
            if turn > 1:
                spent[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in spent.items()}
    return {**medians, "ratio": medians["full"] / medians["small"]}


def _rounded(value: Tensor, digits: int = 2) -> float:
    return round(float(value), digits)
