"""PixArt: whole way, stock pipeline, the size it is told, the mask, and the arithmetic at a tiny alpha."""

from __future__ import annotations

import pytest
import torch

from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import tiny_cascades, tiny_config
from rmd.cascade import Cascade
from rmd.sampler import initial_noise, sample
from rmd.size import Size

PROMPTS = ["a red fox in the snow", "An OLD lighthouse"]


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_equals_stock_pipeline(tiny_folder, tiny_backbone, assert_same, guidance: float) -> None:
    from diffusers import DDIMScheduler, PixArtAlphaPipeline

    backbone, size, steps = tiny_backbone("pixart"), Size(64, 80), 4
    pipeline = PixArtAlphaPipeline.from_pretrained(tiny_folder("pixart"), torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(backbone.latent_shape(size), [3, 4])
    options = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "width": size.width,
        "height": size.height,
        "use_resolution_binning": False,
        "clean_caption": False,
    }
    latents_expected = pipeline(PROMPTS, latents=noise.clone(), output_type="latent", **options).images
    expected = pipeline(PROMPTS, latents=noise.clone(), output_type="pt", **options).images

    timesteps = [int(t) for t in pipeline.scheduler.timesteps]
    cascade = Cascade.from_steps("stock", timesteps, [size] * steps, guidance_scale=guidance)
    uncond = backbone.encode_unconditional(2) if guidance != 1.0 else None
    latents = sample(backbone, cascade, backbone.encode_prompts(PROMPTS), [3, 4], uncond=uncond)
    assert_same(latents, latents_expected)
    assert_same(backbone.decode(latents, size), expected)


def test_default_cascade_draws(tiny_backbone) -> None:
    backbone, cascade = tiny_backbone("pixart"), tiny_cascades("pixart")["2+2"]
    assert [step.timestep for step in cascade.steps] == [1000, 857, 500, 250]
    latents = sample(backbone, cascade, backbone.encode_prompts(PROMPTS), [1, 2])
    pictures = backbone.decode(latents, cascade.full_size)
    assert pictures.shape == (2, 3, 64, 64) and torch.isfinite(pictures).all()


def test_told_the_stage_size(tiny_backbone) -> None:
    inputs = tiny_backbone("pixart").example_inputs("denoiser", Size(32, 64), 2)
    assert inputs["resolution"].tolist() == [[64.0, 32.0]] * 2
    assert inputs["aspect_ratio"].tolist() == [[2.0]] * 2
    config = tiny_config("pixart")
    config["transformer"]["sample_size"] = 32  # the 256 and 512 networks are not told
    untold = get_backbone("pixart").from_config(config, torch.float32, "meta")
    assert "resolution" not in untold.example_inputs("denoiser", Size(32, 64), 2)


def test_padding_is_masked(tiny_backbone) -> None:
    backbone, size = tiny_backbone("pixart"), Size(32, 32)
    conditioning = backbone.encode_prompts(["short"])
    assert conditioning["encoder_hidden_states"].shape[1] == 120
    seen = conditioning["encoder_attention_mask"].bool()
    assert 0 < int(seen.sum()) < 120
    noisy = torch.where(seen[..., None], conditioning["encoder_hidden_states"], torch.tensor(9.0))
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([0.5])
    first = backbone.predict_output(x, t, conditioning, size)
    torch.testing.assert_close(
        backbone.predict_output(x, t, {**conditioning, "encoder_hidden_states": noisy}, size), first
    )


def test_learned_sigma_is_dropped(tiny_backbone) -> None:
    backbone = tiny_backbone("pixart")
    assert backbone.configs["transformer"]["out_channels"] == 8
    assert backbone.run("denoiser", Size(32, 32), backbone.example_inputs("denoiser", Size(32, 32), 1)).shape[1] == 4


def test_sigma_folder_has_longer_text() -> None:
    config = tiny_config("pixart")
    config["model_index"]["_class_name"] = "PixArtSigmaPipeline"
    backbone = get_backbone("pixart").from_config(config, torch.float32, "meta")
    assert backbone.random_conditioning(1)["encoder_hidden_states"].shape[1] == 300
    assert get_backbone("pixart").from_config(tiny_config("pixart"), torch.float32, "meta").text_widths()[
        "encoder_hidden_states"
    ] == (120, 32)


def test_bf16_network_float32_arithmetic(tiny_folder) -> None:
    """At t = 1 alpha is 0.00635: x0 must carry only the network's own rounding, times 157, and none of ours."""
    backbone = get_backbone("pixart").load(tiny_folder("pixart"), dtype=torch.bfloat16)
    size, t = Size(32, 32), torch.ones(2)
    assert backbone.schedule.alpha(1.0) == pytest.approx(0.00635, abs=1e-5)
    x, conditioning = torch.randn(2, 4, 4, 4), backbone.encode_prompts(PROMPTS)
    assert conditioning["encoder_hidden_states"].dtype == torch.bfloat16
    output = backbone.run("denoiser", size, backbone.denoiser_inputs(x, t, conditioning, size))
    assert output.dtype == torch.bfloat16
    alpha, sigma = backbone.schedule.alpha(1.0), backbone.schedule.sigma(1.0)
    exact = (x.double() - sigma * output.double()) / alpha
    x0 = backbone.predict_x0(x, t, conditioning, size)
    assert x0.dtype == torch.float32
    # A few float32 roundings of values in the hundreds. In bfloat16 the error would be 2^-9 of them.
    largest = float(exact.abs().max())
    assert largest > 100
    assert float((x0.double() - exact).abs().max()) < largest * 2**-21
    guided = backbone.guided_x0(x, t, conditioning, conditioning, 5.0, size)
    assert guided.dtype == torch.float32
    assert float((guided.double() - exact).abs().max()) < largest * 2**-20
