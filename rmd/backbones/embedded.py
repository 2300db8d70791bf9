"""The embedded model: this project's own small text-to-image model, trained from scratch on captioned pictograms.

An SD3 transformer on the latents of :class:`~rmd.backbones.autoencoder.EmbeddedAutoencoder`, conditioned on the token
states of a MiniLM sentence encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rmd.backbones.base import Conditioning
from rmd.backbones.sd3 import SD3Backbone
from rmd.backbones.wrappers import SD3Denoiser


class MiniLMEncoder(nn.Module):
    """``BertModel``'s last hidden states, zero where there is padding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L, D) from ``input_ids`` and ``attention_mask``, both (B, L) int64."""
        output: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True
        ).last_hidden_state
        return output * attention_mask[..., None].to(output.dtype)


class EmbeddedDecoder(nn.Module):
    """``EmbeddedAutoencoder``'s decoder from normalised latents to pictures in about [-1, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        channels = vae.config.latent_channels
        # Buffers rather than the model's own lists: an exported graph then names these constants.
        for name, value in (
            ("mean", vae.config.latents_mean or [0.0] * channels),
            ("std", vae.config.latents_std or [1.0] * channels),
        ):
            self.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, 8 H, 8 W) in about [-1, 1] from latents (B, C, H, W)."""
        output: Tensor = self.vae.decoder(latents * self.std.to(latents) + self.mean.to(latents))
        return output


class EmbeddedEncoder(nn.Module):
    """``EmbeddedAutoencoder``'s encoder from pictures in [-1, 1] to normalised latents; it has no posterior."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, C, H / 8, W / 8) of pictures (B, 3, H, W)."""
        output: Tensor = self.vae.encode(pixels)
        return output


class EmbeddedBackbone(SD3Backbone):
    """The embedded model: 128 and 256 pixels, 18.7 M parameters, rectified flow with v = eps - x0.

    Text: at most 24 word pieces of MiniLM, padded positions zeroed; the pooled text is the mean over the others. The
    unconditional branch of guidance is the encoded empty prompt.
    """

    name: ClassVar[str] = "embedded"
    profile: ClassVar[str] = "embedded"
    latent_channels: ClassVar[int] = 8
    components: ClassVar[Mapping[str, str]] = {
        "transformer": "diffusers:SD3Transformer2DModel",
        "vae": "rmd.backbones.autoencoder:EmbeddedAutoencoder",
        "text_encoder": "transformers:BertModel",
    }
    optional: ClassVar[frozenset[str]] = frozenset()
    tokenizers: ClassVar[Mapping[str, int]] = {"tokenizer": 24}

    def wrap(self, raw: Mapping[str, Any]) -> dict[str, nn.Module]:
        """See :meth:`DiffusersBackbone.wrap`; components that ``raw`` lacks are left out."""
        modules: dict[str, nn.Module] = {"denoiser": SD3Denoiser(raw["transformer"])}
        if "vae" in raw:
            modules["decoder"] = EmbeddedDecoder(raw["vae"])
        if "text_encoder" in raw:
            modules["text_encoder"] = MiniLMEncoder(raw["text_encoder"])
        return modules

    def wrap_encoder(self, vae: Any) -> nn.Module:
        """See :meth:`DiffusersBackbone.wrap_encoder`."""
        return EmbeddedEncoder(vae)

    def text_widths(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`DiffusersBackbone.text_widths`."""
        network = self.configs["transformer"]
        return {
            "encoder_hidden_states": (self.tokenizers["tokenizer"], network["joint_attention_dim"]),
            "pooled_projections": (network["pooled_projection_dim"],),
        }

    def example_text(self, component: str, batch: int) -> dict[str, Tensor]:
        """Token inputs of the text encoder."""
        inputs = super().example_text(component, batch)
        return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """``encoder_hidden_states`` (B, 24, 384), zero at padding, and ``pooled_projections`` (B, 384), their mean."""
        inputs = self.tokenize("tokenizer", prompts)
        states = self.run("text_encoder", None, inputs)
        lengths = inputs["attention_mask"].sum(1, keepdim=True).to(torch.float32)
        pooled = states.float().sum(1) / lengths
        return {"encoder_hidden_states": states, "pooled_projections": pooled.to(states.dtype)}
