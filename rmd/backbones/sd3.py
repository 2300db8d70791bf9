"""Stable Diffusion 3 and 3.5: multimodal diffusion transformer, rectified flow, two CLIP encoders and T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from rmd.backbones.base import BackboneError, Conditioning
from rmd.backbones.family import DiffusersBackbone
from rmd.backbones.wrappers import CLIPEncoder, ImageDecoder, SD3Denoiser, T5Encoder
from rmd.size import Size


class SD3Backbone(DiffusersBackbone):
    """``StableDiffusion3Pipeline`` folders. The T5 encoder may be absent; its tokens are zeros then."""

    name: ClassVar[str] = "sd3"
    profile: ClassVar[str] = "sd3"
    prediction: ClassVar[Literal["epsilon", "velocity"]] = "velocity"
    size_multiple: ClassVar[int] = 16  # the autoencoder's 8 and patches of 2
    latent_channels: ClassVar[int] = 16
    components: ClassVar[Mapping[str, str]] = {
        "transformer": "diffusers:SD3Transformer2DModel",
        "vae": "diffusers:AutoencoderKL",
        "text_encoder": "transformers:CLIPTextModelWithProjection",
        "text_encoder_2": "transformers:CLIPTextModelWithProjection",
        "text_encoder_3": "transformers:T5EncoderModel",
    }
    optional: ClassVar[frozenset[str]] = frozenset({"text_encoder_3"})
    tokenizers: ClassVar[Mapping[str, int]] = {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 256}

    def wrap(self, raw: Mapping[str, Any]) -> dict[str, nn.Module]:
        """See :meth:`DiffusersBackbone.wrap`."""
        modules: dict[str, nn.Module] = {"denoiser": SD3Denoiser(raw["transformer"])}
        if "vae" in raw:
            modules["decoder"] = ImageDecoder(raw["vae"])
        for name in ("text_encoder", "text_encoder_2"):
            if name in raw:
                modules[name] = CLIPEncoder(raw[name], pooled=True)
        if "text_encoder_3" in raw:
            modules["text_encoder_3"] = T5Encoder(raw["text_encoder_3"])
        return modules

    def text_widths(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`DiffusersBackbone.text_widths`."""
        network = self.configs["transformer"]
        length = self.tokenizers["tokenizer"] + self.tokenizers["tokenizer_3"]
        return {
            "encoder_hidden_states": (length, network["joint_attention_dim"]),
            "pooled_projections": (network["pooled_projection_dim"],),
        }

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """``encoder_hidden_states`` (B, 77 + 256, 4096): both CLIPs side by side, padded with zeros, then T5;
        ``pooled_projections`` (B, 2048)."""
        clips = []
        for number in ("", "_2"):
            ids = self.tokenize(f"tokenizer{number}", prompts)["input_ids"]
            clips.append(self.run(f"text_encoder{number}", None, {"input_ids": ids}))
        width = self.configs["transformer"]["joint_attention_dim"]
        hidden = torch.cat([clip[:, :-1] for clip in clips], dim=-1)
        if "text_encoder_3" in self._modules:
            # T5 was run without a mask when this network was trained.
            ids = self.tokenize("tokenizer_3", prompts)["input_ids"]
            long = self.run("text_encoder_3", None, {"input_ids": ids})
        else:
            long = hidden.new_zeros(len(prompts), self.tokenizers["tokenizer_3"], width)
        return {
            "encoder_hidden_states": torch.cat([F.pad(hidden, (0, width - hidden.shape[-1])), long], dim=1),
            "pooled_projections": torch.cat([clip[:, -1] for clip in clips], dim=-1),
        }

    def validate_size(self, size: Size) -> None:
        """Besides the multiple, the position table bounds the side."""
        super().validate_size(size)
        network = self.configs["transformer"]
        largest = network["pos_embed_max_size"] * network["patch_size"] * self.spatial_compression
        if max(size.width, size.height) > largest:
            raise BackboneError(f"size {size} is too large for this {self.name}: at most {largest} pixels a side")

    def tokens(self, size: Size) -> int:
        """One token a patch; the text's 333 tokens join them in attention."""
        _, height, width = self.latent_shape(size)
        patch: int = self.configs["transformer"]["patch_size"]
        return (height // patch) * (width // patch)
