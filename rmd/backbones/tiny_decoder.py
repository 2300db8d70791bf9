"""The small decoder's graph, in a file of its own.

This file is part of its engines' keys, with every module of the project that it takes functions from. There are none:
what reads and checks a decoder's folder lies in :mod:`rmd.backbones.decoders`, and changes without a new engine.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

COLOURS = 3


class TinyDecoder(nn.Module):
    """``AutoencoderTiny``'s decoder, from the denoiser's own latents to pictures in about [-1, 1].

    As diffusers' pipelines do, latents are divided by the folder's ``scaling_factor`` and ``shift_factor`` is added:
    1 and 0 for decoders of the taesd kind, which read latents as the denoiser leaves them.

    With ``out_channels`` of 3 p^2 the network draws packed pixels, p x p a position, and they are unpacked here. On a
    CPU the wide, shallow maps at full size are what a decoder's time goes to; packed, it has none.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.shift_factor or 0.0)
        self.patch = math.isqrt(int(vae.config.out_channels) // COLOURS)

    def forward(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, 8 H, 8 W) in about [-1, 1] from latents (B, C, H, W)."""
        if (self.scaling_factor, self.shift_factor) != (1.0, 0.0):
            latents = latents / self.scaling_factor + self.shift_factor
        drawn: Tensor = self.decoder(latents)
        return F.pixel_shuffle(drawn, self.patch) if self.patch > 1 else drawn


class TinyFilmDecoder(TinyDecoder):
    """The same on every frame alone, for autoencoders that do not compress time."""

    def forward(self, latents: Tensor) -> Tensor:
        """Films (B, 3, T, 8 H, 8 W) in about [-1, 1] from latents (B, C, T, H, W)."""
        frames = latents.shape[2]
        pictures: Tensor = super().forward(latents.transpose(1, 2).flatten(0, 1))
        return pictures.view(-1, frames, *pictures.shape[1:]).transpose(1, 2)
