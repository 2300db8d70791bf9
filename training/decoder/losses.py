"""What a distilled decoder is compared by: pixels, features, and a discriminator's opinion."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from training.evaluate.shared.features import EfficientNetLite0

# Blocks after which the features are compared: at 1/2, 1/4, 1/8 and 1/16 of the picture's side, besides the stem.
_TAPS = (0, 2, 4, 10)


def feature_maps(network: EfficientNetLite0, pixels: Tensor) -> list[Tensor]:
    """Features of pictures (B, 3, H, W) in [-1, 1] at several depths, each (B, C, h, w) with unit channel vectors."""
    x = F.relu6(network._bn0(network._conv_stem((pixels * 127.5 + 0.5) / 128)))
    maps = [x]
    for index, block in enumerate(network._blocks):
        x = block(x)
        if index in _TAPS:
            maps.append(x)
        if index == _TAPS[-1]:
            break
    return [F.normalize(features.float(), dim=1, eps=1e-4) for features in maps]


def perceptual_loss(network: EfficientNetLite0, prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of unit feature vectors, over positions and then over depths; a scalar.

    EfficientNet-Lite0's features are also what the evaluation's distances are taken on: a decoder trained with this
    term looks better in those than it is, and its card says so.
    """
    with torch.no_grad():
        wanted = feature_maps(network, target)
    found = feature_maps(network, prediction)
    distances = [(a - b).square().sum(1).mean() for a, b in zip(found, wanted, strict=True)]
    return torch.stack(distances).mean()


class PatchDiscriminator(nn.Module):
    """Tells full from small decodings, patch by patch; spectrally normalised convolutions."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores (B, 1, H / 8, W / 8) of pictures (B, 3, H, W) in [-1, 1]; high means full."""
        return cast(Tensor, self.layers(pixels))


def discriminator_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """The hinge loss of scores; a scalar."""
    return F.relu(1 - real).mean() + F.relu(1 + drawn).mean()
