"""PixArt-alpha: diffusion transformer, noise prediction with learned sigma, variance preserving, T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rmd.backbones.base import Conditioning
from rmd.backbones.family import DiffusersBackbone
from rmd.backbones.wrappers import ImageDecoder, PixArtDenoiser, T5Encoder
from rmd.size import Size


class PixArtBackbone(DiffusersBackbone):
    """``PixArtAlphaPipeline`` folders (and ``PixArtSigmaPipeline``, whose text is 300 tokens long instead of 120).

    The networks of the 1024-MS kind are told height, width and aspect ratio: at every stage, the stage's own.
    """

    name: ClassVar[str] = "pixart"
    profile: ClassVar[str] = "pixart"
    prediction: ClassVar[Literal["epsilon", "velocity"]] = "epsilon"
    size_multiple: ClassVar[int] = 16  # the autoencoder's 8 and patches of 2
    latent_channels: ClassVar[int] = 4
    components: ClassVar[Mapping[str, str]] = {
        "transformer": "diffusers:PixArtTransformer2DModel",
        "vae": "diffusers:AutoencoderKL",
        "text_encoder": "transformers:T5EncoderModel",
    }
    tokenizers: Mapping[str, int] = {"tokenizer": 120}  # type: ignore[misc]

    def wrap(self, raw: Mapping[str, Any]) -> dict[str, nn.Module]:
        """See :meth:`DiffusersBackbone.wrap`."""
        if str(self.configs.get("model_index", {}).get("_class_name", "")).startswith("PixArtSigma"):
            self.tokenizers = {"tokenizer": 300}
        denoiser = PixArtDenoiser(raw["transformer"])
        self._told_size = denoiser.with_size
        modules: dict[str, nn.Module] = {"denoiser": denoiser}
        if "vae" in raw:
            modules["decoder"] = ImageDecoder(raw["vae"])
        if "text_encoder" in raw:
            modules["text_encoder"] = T5Encoder(raw["text_encoder"])
        return modules

    def text_widths(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`DiffusersBackbone.text_widths`."""
        return {
            "encoder_hidden_states": (self.tokenizers["tokenizer"], self.configs["transformer"]["caption_channels"])
        }

    def random_conditioning(self, batch: int) -> Conditioning:
        """Random text, and a mask that shows all of it."""
        length = self.tokenizers["tokenizer"]
        mask = torch.ones(batch, length, dtype=torch.int64, device=self.device)
        return {**super().random_conditioning(batch), "encoder_attention_mask": mask}

    def example_text(self, component: str, batch: int) -> dict[str, Tensor]:
        """Token ids with their mask."""
        inputs = super().example_text(component, batch)
        return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """``encoder_hidden_states`` (B, 120, 4096) and ``encoder_attention_mask`` (B, 120) int64."""
        # As in the network's training: lower case, trimmed.
        inputs = self.tokenize("tokenizer", [prompt.lower().strip() for prompt in prompts])
        return {
            "encoder_hidden_states": self.run("text_encoder", None, inputs),
            "encoder_attention_mask": inputs["attention_mask"],
        }

    def size_conditions(self, size: Size, batch: int) -> Conditioning:
        """``resolution`` (B, 2) height and width, ``aspect_ratio`` (B, 1) height / width; none for other networks."""
        if not self._told_size:
            return {}
        resolution = torch.tensor([[size.height, size.width]], dtype=torch.float32, device=self.device)
        ratio = torch.tensor([[size.height / size.width]], dtype=torch.float32, device=self.device)
        return {"resolution": resolution.expand(batch, 2), "aspect_ratio": ratio.expand(batch, 1)}

    def tokens(self, size: Size) -> int:
        """One token a patch."""
        _, height, width = self.latent_shape(size)
        patch: int = self.configs["transformer"].get("patch_size", 2)
        return (height // patch) * (width // patch)
