"""The embedded model's autoencoder: 8x down, 8 channels, plain residual convolutions around pixel-unshuffle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), no normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape."""
        return x + cast(Tensor, self.conv2(F.silu(self.conv1(F.silu(x)))))


class EmbeddedAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Pictures in [-1, 1] to normalised latents and back; saved and loaded like any diffusers model.

    One normalisation serves all resolutions, so that a latent means the same before and after it is resized.

    Args:
        in_channels: picture channels.
        latent_channels: latent channels.
        widths: channels at 1/4 and 1/8 of the resolution.
        blocks: residual blocks at each of them, on either side.
        patch: pixel-unshuffle factor; the whole compresses ``2 * patch`` times.
        latents_mean, latents_std: per-channel statistics of raw latents; zeros and ones when None.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 8,
        widths: Sequence[int] = (96, 160),
        blocks: Sequence[int] = (2, 3),
        patch: int = 4,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        fine, coarse = widths
        packed = in_channels * patch * patch
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(patch),
            nn.Conv2d(packed, fine, 3, padding=1),
            *(ResidualBlock(fine) for _ in range(blocks[0])),
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1),
            *(ResidualBlock(coarse) for _ in range(blocks[1])),
            nn.SiLU(),
            nn.Conv2d(coarse, latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, coarse, 3, padding=1),
            *(ResidualBlock(coarse) for _ in range(blocks[1])),
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            *(ResidualBlock(fine) for _ in range(blocks[0])),
            nn.SiLU(),
            nn.Conv2d(fine, packed, 3, padding=1),
            nn.PixelShuffle(patch),
        )

    @property
    def compression(self) -> int:
        """Pixels a latent position, along one side."""
        return 2 * int(self.config.patch)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        channels = self.config.latent_channels
        mean = self.config.latents_mean or [0.0] * channels
        std = self.config.latents_std or [1.0] * channels
        shape = (1, channels, 1, 1)
        return like.new_tensor(mean).view(shape), like.new_tensor(std).view(shape)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 8, H/8, W/8) latents of about zero mean and unit variance."""
        raw: Tensor = self.encoder(pixels)
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 8, h, w) normalised latents -> (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        mean, std = self._statistics(latents)
        return cast(Tensor, self.decoder(latents * std + mean))

    def forward(self, pixels: Tensor) -> Tensor:
        """The reconstruction of ``pixels``."""
        return self.decode(self.encode(pixels))
