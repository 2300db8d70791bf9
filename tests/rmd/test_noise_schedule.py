"""Noise schedules: inverses, identities and precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmd.noise_schedule import NoiseSchedule, RectifiedFlow, VariancePreserving

FLOW = RectifiedFlow()
SDXL = VariancePreserving.scaled_linear()
PIXART = VariancePreserving.linear()
ALL = [FLOW, SDXL, PIXART]


@settings(deadline=None, max_examples=50)
@given(st.floats(0.001, 0.999))
def test_flow_time_follows_equation_1(t: float) -> None:
    log_snr = FLOW.log_snr(t)
    assert log_snr == pytest.approx(math.log((1 - t) ** 2 / t**2), abs=1e-9)
    assert FLOW.time_from_log_snr(log_snr) == pytest.approx(1 / (1 + math.exp(log_snr / 2)), rel=1e-12)


@pytest.mark.parametrize("schedule", ALL)
@settings(deadline=None, max_examples=50)
@given(t=st.floats(0.001, 0.998))
def test_time_and_log_snr_are_inverse(schedule: NoiseSchedule, t: float) -> None:
    assert schedule.time_from_log_snr(schedule.log_snr(t)) == pytest.approx(t, abs=1e-9)


def test_ends() -> None:
    assert FLOW.log_snr(1.0) == -math.inf
    assert FLOW.log_snr(0.0) == math.inf
    assert FLOW.time_from_log_snr(-math.inf) == 1.0
    assert FLOW.time_from_log_snr(math.inf) == 0.0
    # The table ends at entry 999, and anything noisier counts as pure noise.
    assert PIXART.log_snr(1.0) == PIXART.log_snr(0.999)
    assert PIXART.time_from_log_snr(-100.0) == 1.0
    assert PIXART.time_from_log_snr(100.0) == 0.0
    assert PIXART.alpha(1.0) == pytest.approx(0.00635, abs=5e-6)


def test_printed_log_snrs() -> None:
    assert SDXL.log_snr(0.75) == pytest.approx(-2.82, abs=0.005)
    assert SDXL.log_snr(0.5) == pytest.approx(-0.96, abs=0.005)
    assert PIXART.log_snr(0.75) == pytest.approx(-5.71, abs=0.005)
    assert PIXART.log_snr(0.5) == pytest.approx(-2.473, abs=0.0005)
    assert FLOW.log_snr(0.9) == pytest.approx(-4.39, abs=0.005)


@pytest.mark.parametrize("schedule", [SDXL, PIXART])
def test_variance_is_preserved(schedule: NoiseSchedule) -> None:
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)
    assert bool((schedule.log_snr(t[:1998]).diff() < 0).all())


@pytest.mark.parametrize("schedule", ALL)
def test_a_tensor_of_times_equals_the_times_one_by_one(schedule: NoiseSchedule) -> None:
    times = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    for function in (schedule.alpha, schedule.sigma, schedule.log_snr):
        got = function(times)
        assert got.dtype == torch.float64
        assert got.tolist() == [function(t) for t in times.tolist()]


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conversions_undo_each_other(schedule: NoiseSchedule, dtype: torch.dtype) -> None:
    x0, eps = torch.randn(2, 4, 3, 5, 5, dtype=dtype).unbind()
    t = torch.tensor([0.1, 0.4, 0.6, 0.8], dtype=torch.float64)
    x_t = schedule.add_noise(x0, eps, t)
    tolerance = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1e-12}
    v = schedule.v_from_x0(x_t, x0, t)
    for got, want in (
        (schedule.x0_from_eps(x_t, eps, t), x0),
        (schedule.eps_from_x0(x_t, x0, t), eps),
        (schedule.x0_from_v(x_t, v, t), x0),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, **tolerance)


def test_velocities_have_their_familys_meaning() -> None:
    x0, eps = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64).unbind()
    torch.testing.assert_close(FLOW.v_from_x0(FLOW.add_noise(x0, eps, 0.3), x0, 0.3), eps - x0)
    alpha, sigma = SDXL.alpha(0.3), SDXL.sigma(0.3)
    torch.testing.assert_close(SDXL.v_from_x0(SDXL.add_noise(x0, eps, 0.3), x0, 0.3), alpha * eps - sigma * x0)


def test_half_precision_samples_are_converted_in_float32() -> None:
    x0, eps = torch.randn(2, 1, 3, 4, 4).bfloat16().unbind()
    x_t = PIXART.add_noise(x0, eps, 0.999)
    assert x_t.dtype == torch.float32
    # Near pure noise the conversion amplifies 157 times: bfloat16 would be off by far more than this.
    torch.testing.assert_close(PIXART.x0_from_eps(x_t, eps, 0.999), x0.float(), rtol=0, atol=1e-3)


def test_a_coefficient_of_the_wrong_batch_is_refused() -> None:
    x = torch.randn(4, 3, 2, 2)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        FLOW.add_noise(x, x, torch.tensor([0.1, 0.2]))


def test_a_wrong_table_is_refused() -> None:
    with pytest.raises(ValueError, match="1000 entries"):
        VariancePreserving(torch.linspace(0.9, 0.1, 10))
    with pytest.raises(ValueError, match="decrease"):
        VariancePreserving(torch.linspace(0.1, 0.9, 1000))
