"""Wan2.1: whole way to a film, stock pipeline, frames, the prompt's cleaning."""

from __future__ import annotations

import pytest
import torch

from rmd.backbones.base import BackboneError
from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import tiny_cascades
from rmd.backbones.wan import clean_prompt
from rmd.cascade import Cascade
from rmd.sampler import initial_noise, sample
from rmd.size import Size

PROMPT = "a red fox   in the snow &amp; wind"
TIMESTEPS = [1000, 909, 716]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_equals_stock_pipeline(tiny_folder, tiny_backbone, assert_same, guidance: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    class FixedTimesteps(FlowMatchEulerDiscreteScheduler):
        """The pipeline takes no list of timesteps; this scheduler ignores the number it asks for."""

        def set_timesteps(self, num_inference_steps=None, device=None, **kwargs):
            super().set_timesteps(sigmas=[t / 1000 for t in TIMESTEPS], device=device)

    backbone, size = tiny_backbone("wan-1.3b"), Size(32, 48, 5)
    pipeline = WanPipeline.from_pretrained(tiny_folder("wan-1.3b"), torch_dtype=torch.float32)
    pipeline.scheduler = FixedTimesteps(shift=1.0)
    pipeline.set_progress_bar_config(disable=True)
    options = {
        "num_inference_steps": len(TIMESTEPS),
        "guidance_scale": guidance,
        "width": size.width,
        "height": size.height,
        "num_frames": size.num_frames,
        "max_sequence_length": 512,
    }
    noise = initial_noise(backbone.latent_shape(size), [3])
    latents_expected = pipeline(PROMPT, latents=noise.clone(), output_type="latent", **options).frames
    expected = pipeline(PROMPT, latents=noise.clone(), output_type="pt", **options).frames

    cascade = Cascade.from_steps("stock", TIMESTEPS, [size] * len(TIMESTEPS), guidance_scale=guidance)
    uncond = backbone.encode_unconditional(1) if guidance != 1.0 else None
    latents = sample(backbone, cascade, backbone.encode_prompts([PROMPT]), [3], uncond=uncond)
    assert_same(latents, latents_expected)
    film = backbone.decode(latents, size)
    assert film.shape == (1, 3, 5, 48, 32)
    assert_same(film, expected.transpose(1, 2))


def test_default_cascade_draws(tiny_backbone) -> None:
    backbone, cascade = tiny_backbone("wan-1.3b"), tiny_cascades("wan-1.3b")["3+3"]
    assert [step.timestep for step in cascade.steps] == [1000, 974, 937, 834, 716, 505]
    latents = sample(backbone, cascade, backbone.encode_prompts([PROMPT]), [1])
    assert latents.shape == (1, 16, 2, 6, 6)
    film = backbone.decode(latents, cascade.full_size)
    assert film.shape == (1, 3, 5, 48, 48) and torch.isfinite(film).all()


def test_text_is_zero_behind_the_prompt(tiny_backbone) -> None:
    text = tiny_backbone("wan-1.3b").encode_prompts(["fox", "a much longer prompt"])["encoder_hidden_states"]
    assert text.shape == (2, 512, 32)
    ends = [int(row.abs().sum(-1).nonzero().max()) + 1 for row in text]
    assert ends[0] < ends[1] < 100


def test_keeps_float32_parts(tiny_folder) -> None:
    """Loaded and built at random alike: the time embedding and the norms stay float32 in a bfloat16 network."""
    from rmd.backbones.tiny import tiny_config

    loaded = get_backbone("wan-1.3b").load(tiny_folder("wan-1.3b"), dtype=torch.bfloat16)
    built = get_backbone("wan-1.3b").from_config(tiny_config("wan-1.3b"), torch.bfloat16)
    kinds = [
        {name: p.dtype for name, p in b.component_modules()["denoiser"].named_parameters()} for b in (loaded, built)
    ]
    assert kinds[0] == kinds[1]
    assert set(kinds[0].values()) == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (Size(32, 32, 4), r"the number of frames must be 4 k \+ 1"),
        (Size(40, 32, 5), "multiples of 16"),
    ],
)
def test_impossible_sizes(tiny_backbone, size: Size, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        tiny_backbone("wan-1.3b").validate_size(size)


def test_clean_prompt() -> None:
    assert clean_prompt("  a &amp;amp; b\n c ") == "a & b c"
    assert clean_prompt("schÃ¶n") == "schön"
