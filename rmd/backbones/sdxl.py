"""Stable Diffusion XL: UNet, noise prediction, variance preserving, two CLIP text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from rmd.backbones.base import BackboneError, Conditioning
from rmd.backbones.family import DiffusersBackbone
from rmd.backbones.wrappers import CLIPEncoder, ImageDecoder, UNetDenoiser
from rmd.size import Size


class SDXLBackbone(DiffusersBackbone):
    """``StableDiffusionXLPipeline`` folders.

    At every stage ``time_ids`` name the stage's own size as original and target size, uncropped: the network is told
    the resolution that it draws, as it was in its training.
    """

    name: ClassVar[str] = "sdxl"
    profile: ClassVar[str] = "sdxl"
    prediction: ClassVar[Literal["epsilon", "velocity"]] = "epsilon"
    size_multiple: ClassVar[int] = 32  # the autoencoder's 8, and two halvings inside the UNet
    latent_channels: ClassVar[int] = 4
    denoiser_folder: ClassVar[str] = "unet"
    components: ClassVar[Mapping[str, str]] = {
        "unet": "diffusers:UNet2DConditionModel",
        "vae": "diffusers:AutoencoderKL",
        "text_encoder": "transformers:CLIPTextModel",
        "text_encoder_2": "transformers:CLIPTextModelWithProjection",
    }
    tokenizers: ClassVar[Mapping[str, int]] = {"tokenizer": 77, "tokenizer_2": 77}

    def wrap(self, raw: Mapping[str, Any]) -> dict[str, nn.Module]:
        """See :meth:`DiffusersBackbone.wrap`.

        Raises:
            BackboneError: a UNet that takes its guidance as an input (LCM's).
        """
        if raw["unet"].config.time_cond_proj_dim is not None:
            raise BackboneError("this UNet takes its guidance as an input (time_cond_proj_dim), which is not supported")
        modules: dict[str, nn.Module] = {"denoiser": UNetDenoiser(raw["unet"])}
        if "vae" in raw:
            modules["decoder"] = ImageDecoder(raw["vae"])
        if "text_encoder" in raw:
            modules["text_encoder"] = CLIPEncoder(raw["text_encoder"], pooled=False)
        if "text_encoder_2" in raw:
            modules["text_encoder_2"] = CLIPEncoder(raw["text_encoder_2"], pooled=True)
        return modules

    def text_widths(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`DiffusersBackbone.text_widths`."""
        unet = self.configs["unet"]
        # The addition embedding takes the pooled text and six sinusoidal sizes in one vector.
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        return {
            "encoder_hidden_states": (self.tokenizers["tokenizer"], unet["cross_attention_dim"]),
            "text_embeds": (pooled,),
        }

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """``encoder_hidden_states`` (B, 77, 2048) and ``text_embeds`` (B, 1280)."""
        first = self.run("text_encoder", None, self._ids("tokenizer", prompts))
        second = self.run("text_encoder_2", None, self._ids("tokenizer_2", prompts))
        return {
            "encoder_hidden_states": torch.cat([first, second[:, :-1]], dim=-1),
            "text_embeds": second[:, -1].contiguous(),
        }

    def encode_unconditional(self, batch: int) -> Conditioning:
        """Zeros where the folder says so (SDXL base 1.0 does), the empty prompt otherwise."""
        if not self.configs.get("model_index", {}).get("force_zeros_for_empty_prompt", True):
            return super().encode_unconditional(batch)
        return {
            name: torch.zeros(batch, *shape, device=self.device, dtype=self.dtype)
            for name, shape in self.text_widths().items()
        }

    def size_conditions(self, size: Size, batch: int) -> Conditioning:
        """``time_ids`` (B, 6): original height and width, crop top and left, target height and width."""
        row = [size.height, size.width, 0, 0, size.height, size.width]
        return {"time_ids": torch.tensor([row], dtype=torch.float32, device=self.device).expand(batch, 6)}

    def tokens(self, size: Size) -> int:
        """Attention begins one halving below the latent: a quarter of its pixels."""
        _, height, width = self.latent_shape(size)
        return (height // 2) * (width // 2)

    def _ids(self, tokenizer: str, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokenize(tokenizer, prompts)["input_ids"]}
