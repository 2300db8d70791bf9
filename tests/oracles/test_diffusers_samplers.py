"""The step function against the diffusers schedulers, over whole trajectories.

The "network" is a fixed nonlinear function of its input, so every step depends on all before it.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
)
from torch import Tensor

from rmd.cascade import Cascade
from rmd.noise_schedule import NoiseSchedule, RectifiedFlow, VariancePreserving
from rmd.presets import preset
from rmd.sampler import advance
from rmd.size import Size


def network(x: Tensor, t: float) -> Tensor:
    return torch.tanh(x.roll(1, -1) - 0.5 * x.roll(1, -2)) * (0.5 + t) + 0.1


def latent_shape(size: Size) -> tuple[int, ...]:
    return (4, size.height // 8, size.width // 8)


@pytest.mark.parametrize("name", ["sd3", "sd3.5-large-turbo"])
def test_deterministic_flow_steps_are_eulers(name: str) -> None:
    steps = [step.teacher_timestep for step in preset(name).steps]
    cascade = Cascade.from_steps("flow", steps, [Size.square(64)] * 4)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[t / 1000 for t in steps])
    schedule = RectifiedFlow()
    ours = theirs = torch.randn(2, 4, 8, 8)
    for index, step in enumerate(cascade.steps):
        x0_hat = schedule.x0_from_v(ours, network(ours, step.t), step.t)
        ours = advance(cascade, index, ours, x0_hat, schedule, latent_shape)
        theirs = scheduler.step(network(theirs, step.t), scheduler.timesteps[index], theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", [VariancePreserving.scaled_linear(), VariancePreserving.linear()])
def test_deterministic_variance_preserving_steps_are_ddims(schedule: NoiseSchedule) -> None:
    sdxl = schedule.alpha(0.999) > 0.05
    betas = {"beta_start": 0.00085, "beta_end": 0.012} if sdxl else {"beta_start": 0.0001, "beta_end": 0.02}
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear" if sdxl else "linear", clip_sample=False, timestep_spacing="trailing", **betas
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(4)
    cascade = preset("sdxl-lightning")
    assert scheduler.timesteps.tolist() == [step.timestep for step in cascade.steps]
    ours = theirs = torch.randn(2, 4, 128, 128, dtype=torch.float64)[..., :128, :128]
    for index, step in enumerate(cascade.steps):
        x0_hat = schedule.x0_from_eps(ours, network(ours, step.t), step.t)
        ours = advance(cascade, index, ours, x0_hat, schedule, latent_shape)
        theirs = scheduler.step(network(theirs, step.t), step.timestep, theirs, eta=0.0).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_fresh_noise_steps_are_lcms() -> None:
    """DMD2's sampler: LCM's without its boundary scaling, i.e. re-noise the predicted x0 to the next time."""
    cascade = preset("dmd2-sdxl")
    schedule = VariancePreserving.scaled_linear()
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    lcm = LCMScheduler(original_inference_steps=50)
    lcm.set_timesteps(timesteps=[step.timestep for step in cascade.steps])
    x = torch.randn(1, 4, 128, 128)
    for index, step in enumerate(cascade.steps[:-1]):
        x0_hat = schedule.x0_from_eps(x, network(x, step.t), step.t)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(index))
        got = advance(cascade, index, x, x0_hat, schedule, latent_shape, noise)
        want = scheduler.add_noise(x0_hat, noise, torch.tensor([cascade.steps[index + 1].timestep]))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        lcms = lcm.step(network(x, step.t), step.timestep, x, generator=torch.Generator().manual_seed(index))
        # LCM's boundary scaling at timestep_scaling 10 differs from 1 by under 1e-6 at these times.
        torch.testing.assert_close(got, lcms.prev_sample, rtol=1e-4, atol=1e-3)
        x = got


@pytest.mark.parametrize(
    ("sides", "sigmas"),
    [
        ([64, 80, 96, 128], [1.0, 0.8959, 0.7371, 0.6022]),
        ([32, 48, 64, 80, 96, 128], [1.0, 0.9454, 0.8959, 0.7904, 0.7371, 0.6022]),
        ([64, 64, 128, 128], [1.0, 0.9, 0.75, 0.5]),
    ],
)
def test_fresh_noise_cascade_is_flow_match_lcms(sides: list[int], sigmas: list[float]) -> None:
    sides = [side // 8 for side in sides]  # the same ratios on small latents
    cascade = Cascade.from_steps(
        "scale-wise",
        [round(1000 * sigma) for sigma in sigmas],
        [Size.square(8 * side) for side in sides],
        resolution_map="none",
        transition_noise_intensity=0.0,
        step_noise_intensity=0.0,
    )
    scheduler = FlowMatchLCMScheduler(
        shift=1.0, scale_factors=[side / sides[0] for side in sides[1:]], upscale_mode="bilinear"
    )
    scheduler.set_timesteps(sigmas=[step.t for step in cascade.steps])
    schedule = RectifiedFlow()
    ours = theirs = torch.randn(2, 4, sides[0], sides[0])
    noises, twins = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    for index, step in enumerate(cascade.steps):
        x0_hat = schedule.x0_from_v(ours, network(ours, step.t), step.t)
        next_side = sides[min(index + 1, len(sides) - 1)]
        noise = torch.randn(2, 4, next_side, next_side, generator=noises)
        ours = advance(cascade, index, ours, x0_hat, schedule, latent_shape, noise)
        theirs = scheduler.step(
            network(theirs, step.t), scheduler.timesteps[index], theirs, generator=twins
        ).prev_sample
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours.shape[-1] == sides[-1]
