"""Wan2.1 text to video, 1.3 B and 14 B: rectified flow over a causal video autoencoder, UMT5."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rmd.backbones.base import BackboneError, Conditioning
from rmd.backbones.decoders import WAN
from rmd.backbones.family import DiffusersBackbone
from rmd.backbones.wrappers import T5Encoder, VideoDecoder, VideoEncoder, WanDenoiser
from rmd.profiles import PROFILES
from rmd.size import Size

if TYPE_CHECKING:
    from rmd.cascade import Cascade

TEMPORAL_COMPRESSION = 4


class WanBackbone(DiffusersBackbone):
    """``WanPipeline`` folders of Wan2.1: one transformer, 81 frames at 16 a second."""

    profile: ClassVar[str] = "wan"
    prediction: ClassVar[Literal["epsilon", "velocity"]] = "velocity"
    media: ClassVar[Literal["image", "video"]] = "video"
    size_multiple: ClassVar[int] = 16  # the autoencoder's 8 and patches of 2
    latent_channels: ClassVar[int] = 16
    frames_per_second: ClassVar[int] = 16
    components: ClassVar[Mapping[str, str]] = {
        "transformer": "diffusers:WanTransformer3DModel",
        "vae": "diffusers:AutoencoderKLWan",
        "text_encoder": "transformers:UMT5EncoderModel",
    }
    tokenizers: ClassVar[Mapping[str, int]] = {"tokenizer": 512}
    # diffusers has no decoder of the taesd kind for these latents; a narrower one of the same class is the small one.
    small_decoder: ClassVar[str] = WAN

    def wrap(self, raw: Mapping[str, Any]) -> dict[str, nn.Module]:
        """See :meth:`DiffusersBackbone.wrap`."""
        modules: dict[str, nn.Module] = {"denoiser": WanDenoiser(raw["transformer"])}
        if "vae" in raw:
            modules["decoder"] = VideoDecoder(raw["vae"])
        if "text_encoder" in raw:
            modules["text_encoder"] = T5Encoder(raw["text_encoder"])
        return modules

    def wrap_encoder(self, vae: Any) -> nn.Module:
        """See :meth:`DiffusersBackbone.wrap_encoder`."""
        return VideoEncoder(vae)

    def wrap_small_decoder(self, network: Any) -> nn.Module:
        """See :meth:`DiffusersBackbone.wrap_small_decoder`."""
        return VideoDecoder(network)

    def validate_size(self, size: Size) -> None:
        """Besides the multiple, the number of frames must be 4 k + 1."""
        super().validate_size(size)
        if (size.num_frames - 1) % TEMPORAL_COMPRESSION:
            raise BackboneError(f"size {size} does not fit {self.name}: the number of frames must be 4 k + 1, as in 81")

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(C, T, H, W); the autoencoder keeps the first frame and folds every further four into one."""
        channels, height, width = super().latent_shape(size)
        return channels, (size.num_frames - 1) // TEMPORAL_COMPRESSION + 1, height, width

    def text_widths(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`DiffusersBackbone.text_widths`."""
        return {"encoder_hidden_states": (self.tokenizers["tokenizer"], self.configs["transformer"]["text_dim"])}

    def example_text(self, component: str, batch: int) -> dict[str, Tensor]:
        """Token ids with their mask."""
        inputs = super().example_text(component, batch)
        return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """``encoder_hidden_states`` (B, 512, 4096), zero behind each prompt's last token."""
        inputs = self.tokenize("tokenizer", [clean_prompt(prompt) for prompt in prompts])
        hidden = self.run("text_encoder", None, inputs)
        return {"encoder_hidden_states": hidden * inputs["attention_mask"][..., None].to(hidden)}

    def tokens(self, size: Size) -> int:
        """One token a spatio-temporal patch."""
        _, frames, height, width = self.latent_shape(size)
        patch: Sequence[int] = self.configs["transformer"]["patch_size"]
        return (frames // patch[0]) * (height // patch[1]) * (width // patch[2])


class Wan14BBackbone(WanBackbone):
    """Wan2.1-T2V-14B: 480p to 720p."""

    name: ClassVar[str] = "wan-14b"


class Wan1p3BBackbone(WanBackbone):
    """Wan2.1-T2V-1.3B, which was trained for 480p: its cascade climbs to 480p from two thirds of it."""

    name: ClassVar[str] = "wan-1.3b"

    def __init__(self, raw: Mapping[str, Any], **options: Any) -> None:
        super().__init__(raw, **options)
        self.sizes = (Size(560, 320, 81), Size(832, 480, 81))

    def default_cascade(self) -> Cascade:
        """The 14 B model's steps and threshold at this model's sizes."""
        from rmd.cascade import Cascade

        profile = PROFILES[self.profile]
        return Cascade.from_thresholds(
            self.name,
            self.schedule,
            self.sizes,
            profile.teacher_timesteps(6),
            profile.thresholds[profile.default_split],
            flow_shift=profile.flow_shift,
            transition_noise_intensity=profile.transition_noise_intensity,
            training_noise_intensity=profile.training_noise_intensity,
            score_noise_intensity=profile.score_noise_intensity,
        )


def clean_prompt(prompt: str) -> str:
    """Repairs mangled Unicode and HTML entities and folds white space, as the published pipeline does."""
    import ftfy

    repaired = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", repaired).strip()
