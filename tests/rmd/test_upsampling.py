"""The upsampling transformation: variances, identities, film, and Eq. 4 and 10 written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rmd.noise_schedule import RectifiedFlow, VariancePreserving
from rmd.upsampling import mix_noise, reinject, resized_noise_std, upsample, upsample_noise

MODES = ["bilinear", "renormalised", "nearest_block"]


@pytest.mark.parametrize("mode", MODES)
def test_the_same_grid_is_left_alone(mode: str) -> None:
    eps = torch.randn(2, 3, 5, 7)
    assert torch.equal(upsample_noise(eps, (5, 7), mode), eps)
    assert torch.equal(upsample(eps, (3, 5, 7)), eps)


def test_bilinear_is_torchs() -> None:
    x = torch.randn(2, 3, 4, 6)
    want = F.interpolate(x, size=(8, 9), mode="bilinear", align_corners=False)
    assert torch.equal(upsample(x, (8, 9)), want)
    assert torch.equal(upsample(x, (3, 8, 9)), want)  # a full latent shape says the same
    assert upsample(x.bfloat16(), (8, 9)).dtype == torch.float32
    assert upsample(x.double(), (8, 9)).dtype == torch.float64


def test_bicubic_is_torchs_without_antialiasing_and_the_area_mean_downwards() -> None:
    x = torch.randn(2, 3, 4, 6)
    want = F.interpolate(x, size=(8, 9), mode="bicubic", align_corners=False, antialias=False)
    assert torch.equal(upsample(x, (8, 9), "bicubic"), want)
    assert torch.equal(upsample(x, (2, 3), "bicubic"), upsample(x, (2, 3)))
    with pytest.raises(ValueError, match="mode 'lanczos'"):
        upsample(x, (8, 9), "lanczos")
    film = torch.randn(2, 3, 5, 4, 6)
    got = upsample(film, (8, 9), "bicubic")
    torch.testing.assert_close(got[:, :, 2], upsample(film[:, :, 2], (8, 9), "bicubic"), rtol=0, atol=1e-6)
    longer = upsample(film, (9, 8, 9), "bicubic")
    want = F.interpolate(got, size=(9, 8, 9), mode="trilinear", align_corners=False)
    torch.testing.assert_close(longer, want)


def test_film_is_resized_frame_by_frame() -> None:
    x = torch.randn(2, 3, 5, 4, 6)
    got = upsample(x, (8, 12))
    assert torch.equal(got, upsample(x, (5, 8, 12)))
    for frame in range(5):
        torch.testing.assert_close(got[:, :, frame], upsample(x[:, :, frame], (8, 12)), rtol=0, atol=1e-6)
    longer = upsample(x, (9, 8, 12))
    torch.testing.assert_close(longer, F.interpolate(x, size=(9, 8, 12), mode="trilinear", align_corners=False))


def test_plain_bilinear_noise_at_2x_has_a_standard_deviation_of_0_625() -> None:
    std = resized_noise_std((8, 8), (16, 16))
    torch.testing.assert_close(std[4:-4, 4:-4], torch.full((8, 8), 0.625, dtype=torch.float64))
    assert std[0, 0] == 1.0  # a corner has one neighbour only


@pytest.mark.parametrize(
    ("source", "target"),
    [((4, 4), (8, 8)), ((4, 6), (6, 9)), ((3, 5), (7, 7)), ((2, 4, 4), (3, 8, 8)), ((3, 4, 4), (3, 6, 6))],
)
def test_renormalised_noise_has_unit_variance_at_every_position(
    source: tuple[int, ...], target: tuple[int, ...]
) -> None:
    # Resizing is linear: resize the unit impulses, and the squares' sum is each output's exact variance.
    count = math.prod(source)
    impulses = torch.eye(count, dtype=torch.float64).reshape(count, 1, *source)
    variance = upsample_noise(impulses, target, "renormalised").square().sum(0)[0]
    torch.testing.assert_close(variance, torch.ones(target, dtype=torch.float64), rtol=0, atol=1e-12)


def test_nearest_block_repeats_values() -> None:
    eps = torch.randn(2, 3, 4, 4)
    assert torch.equal(
        upsample_noise(eps, (8, 12), "nearest_block"), eps.repeat_interleave(2, -2).repeat_interleave(3, -1)
    )
    uneven = upsample_noise(eps, (6, 6), "nearest_block")
    index = torch.tensor([math.floor((i + 0.5) * 4 / 6) for i in range(6)])
    assert torch.equal(uneven, eps[..., index, :][..., index])
    film = torch.randn(1, 2, 3, 4, 4)
    assert torch.equal(
        upsample_noise(film, (8, 8), "nearest_block"), film.repeat_interleave(2, -2).repeat_interleave(2, -1)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", [(4, 4), (3, 5), (8, 3)])
def test_noise_keeps_its_variance_on_the_way_down(mode: str, target: tuple[int, int]) -> None:
    impulses = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    variance = upsample_noise(impulses, target, mode).square().sum(0)[0]
    torch.testing.assert_close(variance, torch.ones(target, dtype=torch.float64), rtol=0, atol=1e-12)


def test_pictures_go_down_by_the_area_mean() -> None:
    x = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(upsample(x, (4, 4)), F.avg_pool2d(x, 2))


@given(st.floats(0, 1))
@settings(deadline=None, max_examples=25)
def test_mixing_keeps_the_variance(intensity: float) -> None:
    eps, noise = torch.randn(2, 1, 1, 200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed = mix_noise(eps, noise, intensity)
    assert mixed.std().item() == pytest.approx(1.0, abs=0.02)
    per_item = mix_noise(eps, noise, torch.tensor([intensity], dtype=torch.float64))
    torch.testing.assert_close(per_item, mixed, rtol=0, atol=1e-12)


def test_mixing_each_item_by_its_own_intensity() -> None:
    eps, noise = torch.randn(2, 3, 2, 4, 4).unbind()
    mixed = mix_noise(eps, noise, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(mixed[0], noise[0])
    assert torch.equal(mixed[2], eps[2])
    torch.testing.assert_close(mixed[1], 0.5 * eps[1] + math.sqrt(0.75) * noise[1])


def test_wrong_noise_is_refused() -> None:
    eps = torch.randn(1, 2, 4, 4)
    assert mix_noise(eps, None, 1.0) is eps
    with pytest.raises(ValueError, match="needs fresh noise"):
        mix_noise(eps, None, 0.9)
    with pytest.raises(ValueError, match="shape"):
        mix_noise(eps, torch.randn(1, 2, 8, 8), 0.5)
    with pytest.raises(ValueError, match="from 0 to 1"):
        mix_noise(eps, eps, 1.5)
    with pytest.raises(ValueError, match="noise_upsampling"):
        upsample_noise(eps, (8, 8), "cubic")
    with pytest.raises(ValueError, match="does not fit"):
        upsample(eps, (8,))
    with pytest.raises(ValueError, match="latents must be"):
        upsample(eps[0], (8, 8))


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VariancePreserving.scaled_linear()])
@pytest.mark.parametrize("mode", MODES)
def test_reinjection_is_equations_4_and_10(schedule: RectifiedFlow | VariancePreserving, mode: str) -> None:
    x0_hat, eps_hat = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64).unbind()
    noise = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    got = reinject(x0_hat, eps_hat, schedule, 0.5, (4, 16, 16), noise, 0.2, mode)
    alpha, sigma = schedule.alpha(0.5), schedule.sigma(0.5)
    eps_mix = 0.2 * upsample_noise(eps_hat, (16, 16), mode) + math.sqrt(1 - 0.04) * noise
    want = alpha * F.interpolate(x0_hat, scale_factor=2, mode="bilinear") + sigma * eps_mix
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_gradients_flow_through_the_hand_over() -> None:
    x0_hat = torch.randn(1, 2, 4, 4, requires_grad=True)
    reinject(x0_hat, x0_hat.detach(), RectifiedFlow(), 0.5, (8, 8), None, 1.0, "renormalised").sum().backward()
    # U's weights sum to the ratio of areas, times alpha = 0.5.
    assert x0_hat.grad is not None
    assert x0_hat.grad.sum().item() == pytest.approx(0.5 * 4 * x0_hat.numel(), rel=1e-5)
