"""SD3.5: whole way, stock pipeline, three text encoders or two."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from rmd.backbones.base import BackboneError
from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import tiny_cascades
from rmd.cascade import Cascade
from rmd.sampler import initial_noise, sample
from rmd.size import Size

PROMPTS = ["a red fox in the snow", "An OLD lighthouse"]


def _stock(folder, size, noise, guidance, timesteps, output_type):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        latents=noise.clone(),
        sigmas=[t / 1000 for t in timesteps],
        num_inference_steps=len(timesteps),
        guidance_scale=guidance,
        width=size.width,
        height=size.height,
        output_type=output_type,
    ).images


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_equals_stock_pipeline(tiny_folder, tiny_backbone, assert_same, guidance: float) -> None:
    backbone, size, timesteps = tiny_backbone("sd3"), Size(64, 80), [1000, 900, 750, 500]
    noise = initial_noise(backbone.latent_shape(size), [3, 4])
    cascade = Cascade.from_steps("stock", timesteps, [size] * 4, guidance_scale=guidance)
    uncond = backbone.encode_unconditional(2) if guidance != 1.0 else None
    latents = sample(backbone, cascade, backbone.encode_prompts(PROMPTS), [3, 4], uncond=uncond)
    assert_same(latents, _stock(tiny_folder("sd3"), size, noise, guidance, timesteps, "latent"))
    expected = _stock(tiny_folder("sd3"), size, noise, guidance, timesteps, "pt")
    assert_same(backbone.decode(latents, size), expected)


def test_default_cascade_draws(tiny_backbone) -> None:
    backbone, cascade = tiny_backbone("sd3"), tiny_cascades("sd3")["2+2"]
    assert [step.timestep for step in cascade.steps] == [1000, 947, 750, 500]
    latents = sample(backbone, cascade, backbone.encode_prompts(PROMPTS), [1, 2])
    pictures = backbone.decode(latents, cascade.full_size)
    assert pictures.shape == (2, 3, 64, 64)
    assert float((pictures[0] - pictures[1]).abs().max()) > 0.01


def test_without_t5_its_tokens_are_zero(tiny_folder, tiny_backbone, tmp_path, assert_same) -> None:
    folder = tmp_path / "sd3"
    shutil.copytree(tiny_folder("sd3"), folder)
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    backbone = get_backbone("sd3").load(folder, dtype=torch.float32)
    text = backbone.encode_prompts(PROMPTS)["encoder_hidden_states"]
    assert text.shape == (2, 77 + 256, 64) and not text[:, 77:].any()
    full = tiny_backbone("sd3").encode_prompts(PROMPTS)["encoder_hidden_states"]
    assert_same(text[:, :77], full[:, :77])
    assert full[:, 77:].any()


def test_size_beyond_the_position_table(tiny_backbone) -> None:
    with pytest.raises(BackboneError, match="272x64 is too large for this sd3: at most 256 pixels"):
        tiny_backbone("sd3").latent_shape(Size(272, 64))
