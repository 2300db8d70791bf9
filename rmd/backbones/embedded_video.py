"""The embedded film model: the embedded model's text encoder and autoencoder, frame by frame, under a film network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from rmd.backbones.base import BackboneError
from rmd.backbones.embedded import EmbeddedBackbone, EmbeddedDecoder, EmbeddedEncoder
from rmd.backbones.tiny_decoder import TinyFilmDecoder
from rmd.backbones.wrappers import FilmDenoiser
from rmd.size import Size


class FilmDecoder(EmbeddedDecoder):
    """``EmbeddedAutoencoder``'s decoder on every frame alone."""

    def forward(self, latents: Tensor) -> Tensor:
        """Films (B, 3, T, 8 H, 8 W) in about [-1, 1] from latents (B, C, T, H, W)."""
        frames = latents.shape[2]
        pictures: Tensor = super().forward(latents.transpose(1, 2).flatten(0, 1))
        return pictures.view(-1, frames, *pictures.shape[1:]).transpose(1, 2)


class FilmEncoder(EmbeddedEncoder):
    """``EmbeddedAutoencoder``'s encoder on every frame alone."""

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, C, T, H / 8, W / 8) of films (B, 3, T, H, W)."""
        frames = pixels.shape[2]
        latents = super().forward(pixels.transpose(1, 2).flatten(0, 1))
        return latents.view(-1, frames, *latents.shape[1:]).transpose(1, 2)


class EmbeddedVideoBackbone(EmbeddedBackbone):
    """The embedded film model: 96 and 144 pixels, 9 frames at 8 a second, as many latent frames as there are pictures.

    Text as for :class:`EmbeddedBackbone`.
    """

    name: ClassVar[str] = "embedded-video"
    profile: ClassVar[str] = "embedded-video"
    media: ClassVar[Literal["image", "video"]] = "video"
    frames_per_second: ClassVar[int] = 8
    takes_frame_numbers: ClassVar[bool] = True
    components: ClassVar[Mapping[str, str]] = {
        **EmbeddedBackbone.components,
        "transformer": "rmd.backbones.film_transformer:FilmTransformer",
    }

    def wrap(self, raw: Mapping[str, Any]) -> dict[str, nn.Module]:
        """See :meth:`DiffusersBackbone.wrap`; components that ``raw`` lacks are left out."""
        modules = super().wrap(raw)
        if "transformer" in raw:
            modules["denoiser"] = FilmDenoiser(raw["transformer"])
        if "vae" in raw:
            modules["decoder"] = FilmDecoder(raw["vae"])
        return modules

    def wrap_encoder(self, vae: Any) -> nn.Module:
        """See :meth:`DiffusersBackbone.wrap_encoder`."""
        return FilmEncoder(vae)

    def wrap_small_decoder(self, network: Any) -> nn.Module:
        """See :meth:`DiffusersBackbone.wrap_small_decoder`."""
        return TinyFilmDecoder(network)

    def validate_size(self, size: Size) -> None:
        """Besides the sides, the temporal table bounds the number of frames."""
        super().validate_size(size)
        longest = self.configs["transformer"]["max_frames"]
        if size.num_frames > longest:
            raise BackboneError(f"size {size} is too long for this {self.name}: at most {longest} frames")

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(C, T, H, W), a latent frame for every frame."""
        channels, height, width = super().latent_shape(size)
        return channels, size.num_frames, height, width

    def tokens(self, size: Size) -> int:
        """One token a patch of each frame."""
        _, frames, height, width = self.latent_shape(size)
        patch: int = self.configs["transformer"]["patch_size"]
        return frames * (height // patch) * (width // patch)
