"""The heads of the published GAN losses, each on the fake score network's middle."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


class ConvolutionalHead(nn.Module):
    """DMD2's: strided 4x4 convolutions from the bottleneck's map down to one logit (main/sd_guidance.py:108-122).

    The map is halved until its shorter side is below 8, then taken in by one convolution of what is left: of SDXL's
    32x32 map, 16, 8, 4, 1. Every convolution is followed by group normalisation (32 groups) and SiLU.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        # 32 groups of 40 channels as published; narrow networks get fewer, of four channels at least.
        groups = math.gcd(32, max(channels // 4, 1))
        layers: list[nn.Module] = []
        while min(height, width) >= 8:
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), nn.GroupNorm(groups, channels), nn.SiLU()]
            height, width = height // 2, width // 2
        layers += [nn.Conv2d(channels, channels, (height, width)), nn.GroupNorm(groups, channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """(B,) logits from a map (B, D, h, w)."""
        logits: Tensor = self.layers(features.float())
        return logits.flatten()


class TokenHead(nn.Module):
    """SwD's: normalised linear layers of falling width on the mean token.

    src/transformer_with_discriminator.py:22-48; four of them (main.py:213).
    """

    def __init__(self, width: int, depth: int = 4) -> None:
        super().__init__()
        widths = torch.linspace(width, 1, depth + 1, dtype=torch.int).tolist()
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.LayerNorm(before), nn.GELU(), nn.Linear(before, after)]
        self.layers = nn.Sequential(*layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B,) logits from tokens (B, N, D)."""
        logits: Tensor = self.layers(tokens.float().mean(1))
        return logits.squeeze(-1)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A new head whose weights the seed alone decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
