"""The sampler: keyed noise, the one step function, and whole runs on data whose posterior mean is known."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from rmd.cascade import Cascade
from rmd.noise_schedule import NoiseSchedule, RectifiedFlow, VariancePreserving
from rmd.presets import preset
from rmd.sampler import (
    advance,
    advance_batch,
    initial_noise,
    needs_noise,
    noise_intensity,
    noise_key,
    sample,
    step_noise,
)
from rmd.size import Size

SMALL = Size.square(64)
LARGE = Size.square(128)


def latent_shape(size: Size) -> tuple[int, ...]:
    return (2, size.height // 16, size.width // 16)


@dataclass
class GaussianBackbone:
    """Every latent is N(mean, std^2), independent: the ideal x0 prediction in closed form, the same at every side."""

    schedule: NoiseSchedule = field(default_factory=RectifiedFlow)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mean: float = 0.7
    std: float = 0.5

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return latent_shape(size)

    def predict_x0(self, latents: Tensor, t: Tensor, conditioning: Mapping[str, Tensor], size: Size) -> Tensor:
        assert latents.shape[1:] == latent_shape(size)
        assert conditioning["mean"].shape == t.shape == latents.shape[:1]
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (self.schedule.alpha, self.schedule.sigma))
        mean = conditioning["mean"].double().reshape(-1, 1, 1, 1)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return (mean + gain * (latents.double() - alpha * mean)).float()

    def guided_x0(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: Mapping[str, Tensor],
        uncond: Mapping[str, Tensor],
        scale: float,
        size: Size,
    ) -> Tensor:
        without = self.predict_x0(latents, t, uncond, size)
        return without + scale * (self.predict_x0(latents, t, conditioning, size) - without)


def prompts(count: int, mean: float = 0.7) -> dict[str, Tensor]:
    return {"mean": torch.full((count,), mean)}


def test_noise_depends_on_seed_and_step_only() -> None:
    shape = (2, 4, 4)
    together = step_noise(shape, [7, 8, 9], 2)
    assert torch.equal(together, step_noise(shape, [9, 7, 8], 2)[[1, 2, 0]])
    assert torch.equal(together[1:2], step_noise(shape, [8], 2))
    assert torch.equal(together, step_noise(shape, [7, 8, 9], [2, 2, 2]))
    assert torch.equal(initial_noise(shape, [7]), step_noise(shape, [7], -1))
    distinct = [step_noise(shape, [seed], step) for seed, step in itertools.product((7, 8, -7), (-1, 0, 1, 11))]
    for a, b in itertools.combinations(distinct, 2):
        assert not torch.equal(a, b)


def test_noise_keys_are_pinned() -> None:
    """A change here would change every picture that a seed stands for."""
    assert noise_key(0, -1) == 7169429350165247082
    assert step_noise((3,), [42], 0)[0].tolist() == pytest.approx([-0.6866997, 0.2226530, 1.2538078], abs=1e-6)


def test_noise_is_standard_normal() -> None:
    noise = initial_noise((4, 32, 32), range(50))
    assert noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert initial_noise((4, 2, 2), [2**64], dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="one of each"):
        step_noise((2,), [1, 2], [0])


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VariancePreserving.linear()])
def test_a_batch_of_different_schedules_equals_each_on_its_own(schedule: NoiseSchedule) -> None:
    """What the server relies on: items of different cascades at one stage advance together, bit for bit."""
    x_t, x0_hat, noise = torch.randn(3, 4, 2, 4, 4).unbind()
    t = [1.0, 0.857, 0.857, 0.7]
    t_next = [0.857, 0.5, 0.6, 0.25]
    intensity = [1.0, 0.0, 0.5, 1.0]
    together = advance_batch(
        schedule,
        x_t,
        x0_hat,
        torch.tensor(t, dtype=torch.float64),
        torch.tensor(t_next, dtype=torch.float64),
        intensity=torch.tensor(intensity, dtype=torch.float64),
        noise=noise,
    )
    for item in range(4):
        one = slice(item, item + 1)
        alone = advance_batch(
            schedule,
            x_t[one],
            x0_hat[one],
            t[item],
            t_next[item],
            intensity=intensity[item],
            noise=noise[one],
        )
        assert torch.equal(together[one], alone)


def test_each_kind_of_step() -> None:
    cascade = replace(preset("embedded"), transition_noise_intensity=0.5, training_noise_intensity=0.2)
    schedule = RectifiedFlow()
    x_t, x0_hat = torch.randn(2, 3, 2, 8, 8).unbind()
    inside = advance(cascade, 0, x_t, x0_hat, schedule, latent_shape)
    torch.testing.assert_close(inside, (1 - 0.857) * x0_hat + 0.857 * x_t)
    assert not needs_noise(cascade, 0)

    assert needs_noise(cascade, 1)
    with pytest.raises(ValueError, match="needs fresh noise"):
        advance(cascade, 1, x_t, x0_hat, schedule, latent_shape)
    noise = torch.randn(3, 2, 16, 16)
    across = advance(cascade, 1, x_t, x0_hat, schedule, latent_shape, noise)
    assert across.shape == noise.shape
    training = advance(cascade, 1, x_t, x0_hat, schedule, latent_shape, noise, training=True)
    same = advance(replace(cascade, transition_noise_intensity=0.2), 1, x_t, x0_hat, schedule, latent_shape, noise)
    assert torch.equal(training, same)
    assert not torch.equal(training, across)

    large = torch.randn(3, 2, 16, 16)
    assert torch.equal(advance(cascade, 3, large, large + 1, schedule, latent_shape), large + 1)
    assert not needs_noise(replace(cascade, step_noise_intensity=0.0), 3)
    assert advance(cascade, 3, large, large.bfloat16(), schedule, latent_shape).dtype == torch.float32
    with pytest.raises(ValueError, match="not one of the cascade's 4 steps"):
        advance(cascade, 4, large, large, schedule, latent_shape)
    with pytest.raises(ValueError, match="must be equal"):
        advance(cascade, 0, x_t, large, schedule, latent_shape)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VariancePreserving.scaled_linear()])
def test_many_deterministic_steps_reach_the_data(schedule: NoiseSchedule) -> None:
    steps = range(1000, 0, -10)
    cascade = Cascade.from_steps("fine", list(steps), [SMALL] * len(steps))
    latents = sample(GaussianBackbone(schedule), cascade, prompts(200), list(range(200)))
    assert latents.mean().item() == pytest.approx(0.7, abs=0.03)
    assert latents.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VariancePreserving.scaled_linear()])
@pytest.mark.parametrize("intensity", [0.0, 0.6, 1.0])
def test_the_variance_after_a_few_steps_is_the_closed_forms(schedule: NoiseSchedule, intensity: float) -> None:
    """The prediction is linear, so the variance follows a recursion in which the fresh noise is independent."""
    cascade = Cascade.from_steps("few", [1000, 750, 500, 250], [SMALL] * 4, step_noise_intensity=intensity)
    backbone = GaussianBackbone(schedule)
    variance = 1.0
    for step, following in itertools.pairwise(cascade.steps):
        alpha, sigma = schedule.alpha(step.t), schedule.sigma(step.t)
        gain = alpha * backbone.std**2 / (alpha**2 * backbone.std**2 + sigma**2)
        noise_gain = (1 - alpha * gain) / sigma
        alpha, sigma = schedule.alpha(following.t), schedule.sigma(following.t)
        kept = alpha * gain + sigma * intensity * noise_gain
        variance = kept**2 * variance + sigma**2 * (1 - intensity**2)
    alpha, sigma = schedule.alpha(0.25), schedule.sigma(0.25)
    gain = alpha * backbone.std**2 / (alpha**2 * backbone.std**2 + sigma**2)
    latents = sample(backbone, cascade, prompts(400), list(range(400)))
    assert latents.std().item() == pytest.approx(gain * variance**0.5, rel=0.03)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VariancePreserving.scaled_linear()])
def test_the_variance_follows_a_list_of_intensities_a_scaled_start_and_an_end_before_zero(
    schedule: NoiseSchedule,
) -> None:
    """The same recursion, with another `a` for each transition, and a last, deterministic move to a time of its own."""
    intensities = (0.2, 0.9, 0.5)
    cascade = Cascade.from_steps(
        "few", [1000, 750.5, 500, 250], [SMALL] * 4,
        step_noise_intensity=intensities, initial_noise_scale=0.8, final_timestep=100,
    )  # fmt: skip
    backbone = GaussianBackbone(schedule)
    variance = 0.8**2
    ends = [*(step.t for step in cascade.steps[1:]), 0.1]
    for step, end, intensity in zip(cascade.steps, ends, (*intensities, 1.0), strict=True):
        alpha, sigma = schedule.alpha(step.t), schedule.sigma(step.t)
        gain = alpha * backbone.std**2 / (alpha**2 * backbone.std**2 + sigma**2)
        noise_gain = (1 - alpha * gain) / sigma
        alpha, sigma = schedule.alpha(end), schedule.sigma(end)
        kept = alpha * gain + sigma * intensity * noise_gain
        variance = kept**2 * variance + sigma**2 * (1 - intensity**2)
    latents = sample(backbone, cascade, prompts(400), list(range(400)))
    assert latents.std().item() == pytest.approx(variance**0.5, rel=0.03)


def test_a_list_of_intensities_is_not_asked_at_a_change_of_size() -> None:
    cascade = replace(preset("embedded"), step_noise_intensity=(0.1, 0.2, 0.3), transition_noise_intensity=0.7)
    assert [noise_intensity(cascade, step) for step in range(4)] == [0.1, 0.7, 0.3, 1.0]
    assert noise_intensity(cascade, 1, training=True) == cascade.training_noise_intensity


def test_a_cascade_runs_through_its_sides() -> None:
    seen: list[tuple[int, float, tuple[int, ...]]] = []
    latents = sample(
        GaussianBackbone(),
        preset("embedded"),
        prompts(2),
        [1, 2],
        on_step=lambda index, step, x0: seen.append((index, step.timestep, tuple(x0.shape))),
    )
    assert seen == [
        (0, 1000, (2, 2, 8, 8)),
        (1, 857, (2, 2, 8, 8)),
        (2, 500, (2, 2, 16, 16)),
        (3, 250, (2, 2, 16, 16)),
    ]
    assert latents.shape == (2, 2, 16, 16)
    assert latents.dtype == torch.float32


def test_high_low_high_runs() -> None:
    steps = [1000, 900, 800, 600, 400, 200]
    cascade = Cascade.from_steps("bottleneck", steps, [LARGE, LARGE, SMALL, SMALL, LARGE, LARGE])
    assert sample(GaussianBackbone(), cascade, prompts(1), [3]).shape == (1, 2, 8, 8)


def test_a_request_is_the_same_in_every_batch() -> None:
    cascade = replace(preset("embedded"), transition_noise_intensity=0.3, step_noise_intensity=0.4)
    together = sample(GaussianBackbone(), cascade, prompts(3), [5, 6, 7])
    for item, seed in enumerate((5, 6, 7)):
        assert torch.equal(sample(GaussianBackbone(), cascade, prompts(1), [seed]), together[item : item + 1])


def test_guidance() -> None:
    cascade = replace(preset("embedded"), guidance_scale=3.0)
    backbone = GaussianBackbone()
    with pytest.raises(ValueError, match="needs the unconditional prompt"):
        sample(backbone, cascade, prompts(1), [0])
    guided = sample(backbone, cascade, prompts(1, 0.7), [0], uncond=prompts(1, 0.2))
    # The prediction is linear in the mean: guidance 3 from 0.2 towards 0.7 is the mean 1.7.
    plain = sample(backbone, preset("embedded"), prompts(1, 1.7), [0])
    torch.testing.assert_close(guided, plain, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="seed"):
        sample(backbone, preset("embedded"), prompts(0), [])
