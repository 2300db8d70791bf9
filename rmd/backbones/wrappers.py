"""Exportable components: modules with named tensors in and one tensor out.

diffusers' and transformers' own ``forward`` take dictionaries, return structures and branch on optional arguments;
these wrappers fix one call each, which torch.export can trace and an engine can be built from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SD3Denoiser(nn.Module):
    """``SD3Transformer2DModel`` as a velocity predictor; used by ``sd3`` and ``embedded``."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        """Velocity of shape (B, C, H, W).

        Args:
            latents: (B, C, H, W).
            timestep: (B,) float32, 1000 t.
            encoder_hidden_states: (B, L, D) text.
            pooled_projections: (B, P) pooled text.
        """
        output: Tensor = self.transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            return_dict=False,
        )[0]
        return output


class FilmDenoiser(nn.Module):
    """``FilmTransformer`` as a velocity predictor."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        frame_numbers: Tensor | None = None,
    ) -> Tensor:
        """Velocity of shape (B, C, T, H, W).

        Args:
            latents: (B, C, T, H, W).
            timestep: (B,) float32, 1000 t.
            encoder_hidden_states: (B, L, D) text.
            pooled_projections: (B, P) pooled text.
            frame_numbers: (B, T) int64, which frames of the film these are; the first T when None.
        """
        output: Tensor = self.transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            frame_numbers=frame_numbers,
            return_dict=False,
        )[0]
        return output


class UNetDenoiser(nn.Module):
    """``UNet2DConditionModel`` with SDXL's text and time conditions, as a noise predictor."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> Tensor:
        """Noise of shape (B, C, H, W).

        Args:
            latents: (B, C, H, W).
            timestep: (B,) float32, 1000 t.
            encoder_hidden_states: (B, L, D) text of both encoders.
            text_embeds: (B, P) pooled text of the second encoder.
            time_ids: (B, 6) original height and width, crop top and left, target height and width, in pixels.
        """
        output: Tensor = self.unet(
            latents,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )[0]
        return output


class PixArtDenoiser(nn.Module):
    """``PixArtTransformer2DModel`` as a noise predictor: the learned-sigma half of its output is dropped."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self.with_size: bool = bool(transformer.use_additional_conditions)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        """Noise of shape (B, C, H, W).

        Args:
            latents: (B, C, H, W).
            timestep: (B,) float32, 1000 t.
            encoder_hidden_states: (B, L, D) text.
            encoder_attention_mask: (B, L) int64, 1 where there is text.
            resolution: (B, 2) height and width in pixels, for the networks that are told (1024-MS).
            aspect_ratio: (B, 1) height / width, likewise.
        """
        sizes: dict[str, Any] = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        output: Tensor = self.transformer(
            latents,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]]


class WanDenoiser(nn.Module):
    """``WanTransformer3DModel`` (text to video) as a velocity predictor."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Velocity of shape (B, C, T, H, W).

        Args:
            latents: (B, C, T, H, W).
            timestep: (B,) float32, 1000 t.
            encoder_hidden_states: (B, L, D) text, zero behind the prompt.
        """
        output: Tensor = self.transformer(
            hidden_states=latents, timestep=timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False
        )[0]
        return output


class ImageDecoder(nn.Module):
    """``AutoencoderKL`` from scaled latents to pictures in [-1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.shift_factor or 0.0)

    def forward(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, 8 H, 8 W) in about [-1, 1] from latents (B, C, H, W)."""
        output: Tensor = self.vae.decode(latents / self.scaling_factor + self.shift_factor, return_dict=False)[0]
        return output


class _FilmAutoencoder(nn.Module):
    """``AutoencoderKLWan`` with the mean and deviation (1, C, 1, 1, 1) that its latents are normalised by."""

    mean: Tensor
    std: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        shape = (1, -1, 1, 1, 1)
        self.register_buffer("mean", torch.tensor(vae.config.latents_mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(vae.config.latents_std).view(shape), persistent=False)


class VideoDecoder(_FilmAutoencoder):
    """``AutoencoderKLWan`` from normalised latents to films in [-1, 1]."""

    def forward(self, latents: Tensor) -> Tensor:
        """Films (B, 3, 4 (T - 1) + 1, 8 H, 8 W) in [-1, 1] from latents (B, C, T, H, W)."""
        scaled = latents * self.std.to(latents) + self.mean.to(latents)
        output: Tensor = self.vae.decode(scaled, return_dict=False)[0]
        return output


def posterior_sample(posterior: Any, noise: Tensor | None) -> Tensor:
    """The mode of an autoencoder's posterior, or with standard normal `noise` a sample of it."""
    mean: Tensor = posterior.mode()
    return mean if noise is None else mean + posterior.std * noise.to(mean)


class ImageEncoder(nn.Module):
    """``AutoencoderKL`` from pictures in [-1, 1] to scaled latents: :class:`ImageDecoder`'s way back."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.shift_factor or 0.0)

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, C, H / 8, W / 8) of pictures (B, 3, H, W); ``noise`` in the latents' shape samples them."""
        raw = posterior_sample(self.vae.encode(pixels).latent_dist, noise)
        return (raw - self.shift_factor) * self.scaling_factor


class VideoEncoder(_FilmAutoencoder):
    """``AutoencoderKLWan`` from films in [-1, 1] to normalised latents: :class:`VideoDecoder`'s way back."""

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, C, (T - 1) / 4 + 1, H / 8, W / 8) of films (B, 3, T, H, W); ``noise`` samples them."""
        raw = posterior_sample(self.vae.encode(pixels).latent_dist, noise)
        return (raw - self.mean.to(raw)) / self.std.to(raw)


class CLIPEncoder(nn.Module):
    """A CLIP text encoder: hidden states before the last layer and, where there is a projection, the pooled text.

    The pooled vector is appended as one more row, so that a component has one output: (B, L + 1, D).
    """

    def __init__(self, model: Any, pooled: bool) -> None:
        super().__init__()
        self.model = model
        self.pooled = pooled
        if pooled and model.config.projection_dim != model.config.hidden_size:
            raise ValueError(
                f"CLIP projection_dim {model.config.projection_dim} must equal hidden_size {model.config.hidden_size}"
            )

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L, D) hidden states, or (B, L + 1, D) with the pooled text last, from ``input_ids`` (B, L) int64."""
        output = self.model(input_ids, output_hidden_states=True, return_dict=True)
        hidden: Tensor = output.hidden_states[-2]
        if not self.pooled:
            return hidden
        return torch.cat([hidden, output.text_embeds[:, None].to(hidden)], dim=1)


class T5Encoder(nn.Module):
    """A T5 or UMT5 encoder's last hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L, D) from ``input_ids`` (B, L) int64 and, where padding is masked, ``attention_mask`` (B, L) int64."""
        output: Tensor = self.model(input_ids, attention_mask=attention_mask, return_dict=True).last_hidden_state
        return output
