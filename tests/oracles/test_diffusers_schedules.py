"""Noise schedules and printed step lists against the diffusers schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from rmd.noise_schedule import RectifiedFlow, VariancePreserving
from rmd.presets import preset

TABLES = {
    "sdxl": ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, "scaled_linear"),
    "pixart": ({"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}, "linear"),
}


def ddpm(name: str) -> tuple[DDPMScheduler, VariancePreserving]:
    config, constructor = TABLES[name]
    scheduler = DDPMScheduler(**config, clip_sample=False)
    return scheduler, getattr(VariancePreserving, constructor)()


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_the_schedulers(name: str) -> None:
    scheduler, schedule = ddpm(name)
    times = torch.arange(1000, dtype=torch.float64) / 1000
    torch.testing.assert_close(
        schedule.alpha(times) ** 2, scheduler.alphas_cumprod.double(), rtol=1e-12, atol=0, msg="alphas_cumprod"
    )
    assert torch.equal(schedule.alpha(torch.tensor([0.999, 1.0]))[:1], schedule.alpha(torch.tensor([1.0])))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("index", [0, 1, 250, 500, 857, 999])
def test_add_noise(name: str, index: int) -> None:
    scheduler, schedule = ddpm(name)
    x0, eps = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64).unbind()
    want = scheduler.add_noise(x0, eps, torch.full((3,), index))
    got = schedule.add_noise(x0, eps, torch.full((3,), index / 1000, dtype=torch.float64))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("index", [1, 500, 999])
def test_predicted_x0(name: str, prediction: str, index: int) -> None:
    scheduler, schedule = ddpm(name)
    scheduler.register_to_config(prediction_type=prediction)
    # The scheduler takes its coefficients' precision from the table.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    x_t, output = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64).unbind()
    want = scheduler.step(output, index, x_t, generator=torch.Generator().manual_seed(0)).pred_original_sample
    convert = schedule.x0_from_eps if prediction == "epsilon" else schedule.x0_from_v
    torch.testing.assert_close(convert(x_t, output, index / 1000), want, rtol=1e-10, atol=1e-10)


def test_flow_noise() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    x0, eps = torch.randn(2, 3, 4, 8, 8).unbind()
    want = scheduler.scale_noise(x0, torch.tensor([100.0, 500.0, 1000.0]), eps)
    got = RectifiedFlow().add_noise(x0, eps, torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_flow_shift() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert [round(t) for t in scheduler.timesteps.tolist()] == [s.teacher_timestep for s in preset("sd3").steps]


@pytest.mark.parametrize("name", ["sd3.5-large-turbo", "sd3.5-medium-turbo"])
def test_turbos_steps_are_its_schedulers(name: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    steps = preset(name).steps
    scheduler.set_timesteps(len(steps))
    assert scheduler.timesteps.tolist() == pytest.approx([step.timestep for step in steps], rel=1e-5)


@pytest.mark.parametrize("name", ["lcm-sdxl", "lcm-sdxl-8", "pixart-lcm"])
def test_lcms_steps_are_its_schedulers(name: str) -> None:
    scheduler = LCMScheduler(original_inference_steps=50)
    steps = preset(name).steps
    scheduler.set_timesteps(len(steps))
    assert scheduler.timesteps.tolist() == [step.timestep for step in steps]
