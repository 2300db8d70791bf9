"""SDXL: the tiny folder goes the whole way, and one resolution equals the stock pipeline."""

from __future__ import annotations

import pytest
import torch

from rmd.backbones.tiny import tiny_cascades
from rmd.cascade import Cascade
from rmd.sampler import initial_noise, sample
from rmd.size import Size

PROMPTS = ["a red fox in the snow", "An OLD lighthouse"]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_equals_stock_pipeline(tiny_folder, tiny_backbone, assert_same, guidance: float) -> None:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    backbone, size, steps = tiny_backbone("sdxl"), Size(64, 96), 4
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_folder("sdxl"), torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(backbone.latent_shape(size), [3, 4])
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "width": size.width, "height": size.height}
    expected = pipeline(PROMPTS, latents=noise.clone(), output_type="pt", **options).images

    timesteps = [int(t) for t in pipeline.scheduler.timesteps]
    assert timesteps == [999, 749, 499, 249]
    cascade = Cascade.from_steps("stock", timesteps, [size] * steps, guidance_scale=guidance)
    uncond = backbone.encode_unconditional(2) if guidance != 1.0 else None
    latents = sample(backbone, cascade, backbone.encode_prompts(PROMPTS), [3, 4], uncond=uncond)
    assert_same(backbone.decode(latents, size), expected)
    latents_expected = pipeline(PROMPTS, latents=noise.clone(), output_type="latent", **options).images
    assert_same(latents, latents_expected)


def test_default_cascade_draws(tiny_backbone) -> None:
    backbone, cascade = tiny_backbone("sdxl"), tiny_cascades("sdxl")["2+2"]
    assert [step.timestep for step in cascade.steps] == [1000, 857, 500, 250]
    latents = sample(backbone, cascade, backbone.encode_prompts(PROMPTS), [1, 2])
    pictures = backbone.decode(latents, cascade.full_size)
    assert pictures.shape == (2, 3, 64, 64)
    assert 0.0 <= float(pictures.min()) <= float(pictures.max()) <= 1.0
    assert float((pictures[0] - pictures[1]).abs().max()) > 0.01


def test_time_ids_name_the_stage(tiny_backbone) -> None:
    backbone = tiny_backbone("sdxl")
    for size in (Size(32, 64), Size(64, 32)):
        ids = backbone.example_inputs("denoiser", size, 2)["time_ids"]
        assert ids.tolist() == [[size.height, size.width, 0, 0, size.height, size.width]] * 2
    # and the network reads them
    x = torch.randn(1, 4, 8, 8)
    size = Size(64, 64)
    inputs = backbone.denoiser_inputs(x, torch.tensor([0.5]), backbone.encode_prompts(["x"]), size)
    other = {**inputs, "time_ids": inputs["time_ids"] / 2}
    assert float((backbone.run("denoiser", size, inputs) - backbone.run("denoiser", size, other)).abs().max()) > 1e-5


def test_unconditional_is_zero_as_the_folder_says(tiny_backbone) -> None:
    backbone = tiny_backbone("sdxl")
    assert all(not value.any() for value in backbone.encode_unconditional(3).values())
    index = backbone.configs["model_index"]
    index["force_zeros_for_empty_prompt"] = False
    try:
        given, prompt = backbone.encode_unconditional(2), backbone.encode_prompts(["", ""])
    finally:
        index["force_zeros_for_empty_prompt"] = True
    for name, value in prompt.items():
        torch.testing.assert_close(given[name], value)
