"""The loss functions against their formulas."""

from __future__ import annotations

import pytest
import torch

from rmd.noise_schedule import RectifiedFlow, VariancePreserving
from training.distill import losses


def sample(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_direction_has_the_value_fake_minus_real_and_gradient_one() -> None:
    y = sample(2, 3, 4, 4).requires_grad_()
    real, fake = sample(2, 3, 4, 4, seed=1).requires_grad_(), sample(2, 3, 4, 4, seed=2).requires_grad_()
    d = losses.dmd_direction(y, real, fake)
    torch.testing.assert_close(d, fake - real)
    d.sum().backward()
    torch.testing.assert_close(y.grad, torch.ones_like(y))
    assert real.grad is None and fake.grad is None


def test_pseudo_huber_is_the_papers_vector_norm_form() -> None:
    d = sample(3, 2, 4, 4)
    dim = 32
    c = 0.00054 * dim**0.5
    expected = [((row.norm() ** 2 + c**2) ** 0.5 - c) / dim**0.5 for row in d.flatten(1)]
    torch.testing.assert_close(losses.pseudo_huber(d), torch.stack(expected))


def test_pseudo_huber_gradient_is_parallel_to_the_difference_and_bounded() -> None:
    d = (sample(4, 2, 4, 4) * torch.tensor([1e-3, 1.0, 10.0, 1e3]).view(4, 1, 1, 1)).requires_grad_()
    losses.pseudo_huber(d).sum().backward()
    assert d.grad is not None
    cosine = torch.nn.functional.cosine_similarity(d.grad.flatten(1), d.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert bool((d.grad.flatten(1).norm(dim=1) <= 1 / 32**0.5 + 1e-12).all())


def test_elementwise_huber_and_squared() -> None:
    d = sample(2, 1, 2, 2)
    flat = d.flatten(1)
    torch.testing.assert_close(losses.elementwise_huber(d, 1e-3), ((flat**2 + 1e-6).sqrt() - 1e-3).mean(1))
    torch.testing.assert_close(losses.squared(d), (flat**2).sum(1) / 8)


def test_normaliser_is_per_sample_and_detached() -> None:
    y = sample(2, 1, 2, 2).requires_grad_()
    real = torch.stack([y.detach()[0], y.detach()[1] + 2.0])
    value = losses.normaliser(y, real)
    assert not value.requires_grad
    assert value.tolist() == pytest.approx([1e-6, 2.0])


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VariancePreserving.scaled_linear()])
def test_velocity_weight_turns_x0_error_into_velocity_error(schedule: RectifiedFlow | VariancePreserving) -> None:
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x0, other, eps = sample(3, 1, 2, 2), sample(3, 1, 2, 2, seed=1), sample(3, 1, 2, 2, seed=2)
    x_t = schedule.add_noise(x0, eps, t)
    velocity = (schedule.v_from_x0(x_t, other, t) - schedule.v_from_x0(x_t, x0, t)).square().flatten(1).mean(1)
    weighted = losses.velocity_weight(schedule, t) * (other - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(weighted, velocity)


def test_snr_weight_is_capped_and_scaled_by_resolution() -> None:
    schedule = RectifiedFlow()
    t = torch.tensor([0.05, 0.5, 0.8], dtype=torch.float64)
    assert losses.snr_weight(schedule, t).tolist() == pytest.approx([5.0, 1.0, 0.0625])
    assert losses.snr_weight(schedule, t, 2.0).tolist() == pytest.approx([5.0, 0.25, 0.015625])


def test_mean_snr_weight_matches_the_integral() -> None:
    # Above t = 0.5 the cap is not reached; the integral of (1-t)^2/t^2 is t - 2 ln t - 1/t.
    def primitive(t: float) -> float:
        return t - 2 * torch.tensor(t, dtype=torch.float64).log().item() - 1 / t

    expected = (primitive(0.98) - primitive(0.5)) / 0.48
    assert losses.mean_snr_weight(RectifiedFlow(), 0.5, 0.98) == pytest.approx(expected, rel=1e-5)


def test_fake_score_loss_weights_samples_and_detaches_the_target() -> None:
    x0, target = sample(2, 1, 2, 2).requires_grad_(), sample(2, 1, 2, 2, seed=1).requires_grad_()
    weight = torch.tensor([2.0, 0.0], dtype=torch.float64)
    loss = losses.fake_score_loss(x0, target, weight)
    torch.testing.assert_close(loss, (x0[0] - target[0]).square().mean())
    loss.backward()
    assert target.grad is None and x0.grad is not None and not bool(x0.grad[1].any())


def test_mmd_compares_token_means_and_ignores_their_order() -> None:
    tokens = sample(2, 6, 4)
    assert float(losses.mmd_loss(tokens, tokens[:, torch.randperm(6)])) == pytest.approx(0.0, abs=1e-6)
    shifted = losses.mmd_loss(tokens + 0.5, tokens)
    assert float(shifted) == pytest.approx((0.25 + 1e-6) ** 0.5 - 1e-3, rel=1e-5)


def test_gan_losses_pull_in_opposite_directions() -> None:
    logits = torch.tensor([0.3, -1.2], requires_grad=True)
    losses.gan_generator_loss(logits).backward()
    assert logits.grad is not None and bool((logits.grad < 0).all())
    student = torch.tensor([0.3, -1.2], requires_grad=True)
    losses.gan_discriminator_loss(torch.zeros(2), student).backward()
    assert student.grad is not None and bool((student.grad > 0).all())
