"""The rivals against their publications: formulas written out here, on fixed tensors.

Sources: Luo-Yihong/TDM 81b019f, tianweiy/DMD2 8d8fa55, yandex-research/swd 9c51e19 (files and lines at each test).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import tiny_config
from rmd.noise_schedule import RectifiedFlow, VariancePreserving
from rmd.presets import preset
from tests.training.distil_setup import FULL, LOW, attach_samples, make_method, make_trainer, settings_for
from training.distill.intervals import faded_intensity
from training.distill.losses import uncapped_snr
from training.distill.methods import METHODS
from training.distill.methods.base import DistributionMatching, Matched, Scores
from training.distill.methods.discriminators import ConvolutionalHead, TokenHead
from training.distill.methods.tokens import TokenTap
from training.distill.roles import Networks
from training.distill.settings import DistillSettings
from training.distill.teacher import Teacher, training_cascade
from training.runtime.randomness import Randomness

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
F64 = torch.float64


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Given(Randomness):
    """Hands out the noise that it was given, and one time for all."""

    def __init__(self, noise: Tensor, time: float) -> None:
        super().__init__(0)
        self.given, self.time = noise, time

    def normal(self, shape: Sequence[int]) -> Tensor:
        assert tuple(shape) == tuple(self.given.shape)
        return self.given

    def uniform(self, count: int) -> Tensor:
        return torch.full((count,), self.time, dtype=F64)


def matched_at(steps: list[int], seed: int = 0, clean: Tensor | None = None) -> Matched:
    rows = torch.arange(len(steps)) % 5
    y, eps = (values(len(steps), 8, 8, 8, seed=seed + i) for i in (0, 1))
    return Matched(FULL, y.requires_grad_(), eps, torch.tensor(steps), rows, clean)


def with_networks(name: str, **options: Any) -> tuple[DistributionMatching, Networks]:
    settings = settings_for(name, **options)
    method = make_method(settings)
    networks = Networks.build(method.backbone, settings)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in networks.fake.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    if method.needs_samples:
        attach_samples(method, networks)
    return method, networks


# ---- TDM ------------------------------------------------------------------------------------------------------------


def test_tdms_sample_goes_by_the_trajectory_to_its_steps_end_and_by_the_forward_process_from_there() -> None:
    """train_tdm_demo.py:1121-1123 with add_noise of 1036-1045, on rectified flow."""
    method = make_method(settings_for("tdm"))
    fresh = values(4, 8, 8, 8, seed=7)
    matched = matched_at([0, 1, 2, 3])
    sample = method.score_sample(matched, Given(fresh, 0.4))
    # Steps at 1, .75, .5, .25: the pieces are [.75, .98], [.5, .74], [.25, .49], [.02, .24], .01 left out at the top.
    bounds = [(0.75, 0.98), (0.5, 0.74), (0.25, 0.49), (0.02, 0.24)]
    assert method.intervals.tolist() == [pytest.approx(pair) for pair in bounds]
    for i, (low, high) in enumerate(bounds):
        mid, tau = (0.75, 0.5, 0.25, 0.0)[i], low + 0.4 * (high - low)
        x_mid = (1 - mid) * matched.y[i] + mid * matched.eps[i]
        beta = (tau**2 - ((1 - tau) / (1 - mid) * mid) ** 2) ** 0.5
        torch.testing.assert_close(sample.x[i], (1 - tau) / (1 - mid) * x_mid + beta * fresh[i])
        # obtain_mixed_noise, 1047-1057.
        mixed = (matched.eps[i] / (1 - mid) * (1 - tau) * mid + beta * fresh[i]) / tau
        torch.testing.assert_close(sample.noise[i], mixed)
        weight = min(((1 - tau) / tau) ** 2, 5.0)
        weight *= float(torch.exp(-0.5 * mixed.square().mean()) / torch.exp(-0.5 * fresh[i].square().mean()))
        assert float(method.fake_weights(matched, sample)[i]) == pytest.approx(weight)


def test_tdms_share_of_predicted_noise_on_pixarts_table() -> None:
    from diffusers import DDPMScheduler

    table = DDPMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02).alphas_cumprod.double()
    alpha, sigma = table.sqrt(), (1 - table).sqrt()
    mid, tau = torch.tensor([0, 224, 449, 674]), torch.tensor([100, 300, 600, 880])
    expected = alpha[tau] / alpha[mid] * sigma[mid] / sigma[tau]
    share = faded_intensity(VariancePreserving.linear(), torch.ones(4, dtype=F64), mid / 1000, tau / 1000)
    torch.testing.assert_close(share, expected, rtol=1e-6, atol=1e-9)
    # The forward process keeps the variance, and the later, the less is left.
    beta = (sigma[tau] ** 2 - (alpha[tau] / alpha[mid] * sigma[mid]) ** 2).sqrt()
    torch.testing.assert_close((share * sigma[tau]).square() + beta**2, sigma[tau] ** 2)


def test_tdms_losses_are_the_published_ones() -> None:
    """train_tdm_demo.py:1130-1135 (fake score) and 1169-1183 (student)."""
    method = make_method(settings_for("tdm"))
    matched, real, fake = matched_at([0, 3]), values(2, 8, 8, 8, seed=8), values(2, 8, 8, 8, seed=9)
    sample = method.score_sample(matched, Given(values(2, 8, 8, 8, seed=7), 0.5))
    loss, _ = method.generator_loss(matched, Scores(sample, real, fake), Randomness(0))
    y = matched.y.detach()
    error = ((y - (y + real - fake)).square() + 1e-6).sqrt() - 1e-3
    weighting = (y - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    assert float(loss.detach()) == pytest.approx(float((error / weighting).mean()))
    critic = method.critic_loss(matched, None, Randomness(0), Scores(sample, real, fake))
    tau = torch.tensor([0.75 + 0.5 * 0.23, 0.02 + 0.5 * 0.22], dtype=F64)
    weight = ((1 - tau) / tau).square().clamp(max=5) * torch.exp(
        -0.5 * (sample.noise.square() - sample.fresh.square()).mean((1, 2, 3))
    )
    assert float(critic) == pytest.approx(float((weight * (fake - y).square().mean((1, 2, 3))).mean()))


def test_tdm_draws_a_step_for_every_sample_and_trains_the_fake_score_first(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", method="tdm", batch_size=16)
    states = trainer.method.states(trainer.updater.rollouts[0], trainer.networks.student, range(4))
    assert sum(len(state.rows) for state in states) == 16 and len(states) > 1
    order: list[str] = []
    for name in ("student_optimizer", "fake_optimizer"):
        optimizer = getattr(trainer, name)
        step = optimizer.step
        optimizer.step = lambda *args, step=step, name=name: (order.append(name), step(*args))[1]
    trainer.update()
    assert order == ["fake_optimizer", "student_optimizer"]


def test_tdm_clips_the_students_gradients_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", method="tdm")
    assert trainer.student_optimizer.clip_norm == 1.0
    assert trainer.fake_optimizer.clip_norm == float("inf")
    assert trainer.fake_optimizer.adamw.defaults["weight_decay"] == 0.01


# ---- DMD2 -----------------------------------------------------------------------------------------------------------


def test_dmd2s_head_on_sdxls_bottleneck_is_the_published_one() -> None:
    """main/sd_guidance.py:108-122: 32x32 -> 16 -> 8 -> 4 -> 1."""
    with torch.device("meta"):
        head = ConvolutionalHead(1280, 32, 32)
        features, sides = torch.zeros(2, 1280, 32, 32), []
        for layer in head.layers:
            features = layer(features)
            if isinstance(layer, nn.Conv2d):
                sides.append((features.shape[1], features.shape[-1], layer.kernel_size[0]))
    assert sides == [(1280, 16, 4), (1280, 8, 4), (1280, 4, 4), (1280, 1, 4), (1, 1, 1)]
    norms = [layer for layer in head.layers if isinstance(layer, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [32] * 4
    assert sum(p.numel() for p in head.parameters()) == 4 * (1280 * 1280 * 16 + 1280 + 2 * 1280) + 1280 + 1


def test_a_heads_logits_depend_on_where_things_are() -> None:
    head = ConvolutionalHead(16, 4, 6)
    features = torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    assert head(features).shape == (3,)
    assert not torch.allclose(head(features), head(features.flip(-1)), atol=1e-4)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VariancePreserving.scaled_linear()])
def test_dmd2s_fake_score_learns_the_noise(schedule: RectifiedFlow | VariancePreserving) -> None:
    """main/sd_guidance.py:295-297: `mean((eps_pred - noise)^2)`, here by way of x0."""
    t = torch.tensor([0.001, 0.3, 0.7, 0.99], dtype=F64)
    y, noise, predicted_noise = values(4, 2, 3, 3), values(4, 2, 3, 3, seed=1), values(4, 2, 3, 3, seed=2)
    x = schedule.add_noise(y, noise, t)
    x0 = schedule.x0_from_eps(x, predicted_noise, t)
    weighted = uncapped_snr(schedule, t) * (x0 - y).square().flatten(1).mean(1)
    torch.testing.assert_close(weighted, (predicted_noise - noise).square().flatten(1).mean(1))


def test_dmd2s_students_gradient_is_the_published_one() -> None:
    """main/sd_guidance.py:238-241."""
    method = make_method(settings_for("dmd2", gan_weight=0.0))
    matched, real, fake = matched_at([1, 2]), values(2, 8, 8, 8, seed=8), values(2, 8, 8, 8, seed=9)
    sample = method.score_sample(matched, Randomness(3))
    loss, _ = method.generator_loss(matched, Scores(sample, real, fake), Randomness(0))
    (gradient,) = torch.autograd.grad(loss, matched.y)
    y = matched.y.detach().requires_grad_()
    p_real, p_fake = y.detach() - real, y.detach() - fake
    grad = (p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3], keepdim=True)
    published = 0.5 * F.mse_loss(y, (y - grad).detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(published, y)[0])


class Seen:
    """The times and samples that the fake network was called with."""

    def __init__(self, method: DistributionMatching, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        predict = method.backbone.predict_x0

        def watched(latents: Tensor, t: Tensor, *args: Any, **options: Any) -> Tensor:
            self.calls.append((latents.detach(), t))
            return predict(latents, t, *args, **options)

        monkeypatch.setattr(method.backbone, "predict_x0", watched)


def test_dmd2s_gan_has_times_of_its_own_and_two_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """main/sd_guidance.py:145-165 (a draw a call, the bottleneck's map), main/train_sd.py:372 and 401 (the weights)."""
    method, networks = with_networks("dmd2", guidance_scale=1.0)
    assert (method.settings.gan_weight, method.settings.gan_critic_weight) == (5e-3, 1e-2)
    matched = matched_at([0, 1, 2, 3])
    seen = Seen(method, monkeypatch)
    whole = float(method.critic_loss(matched, networks.fake, Randomness(1)).detach())
    (_, score_t), (real_x, real_t), (student_x, student_t) = seen.calls
    assert len({tuple(t.tolist()) for t in (score_t, real_t, student_t)}) == 3
    method.settings.gan_critic_weight = 0.0
    plain = float(method.critic_loss(matched, networks.fake, Randomness(1)).detach())
    draws = Randomness(1)
    draws.uniform(4), draws.normal(matched.y.shape)  # of the score's sample
    real_rows = draws.integers(6, 4) % 5

    def judged(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        with TokenTap(networks.fake).listening() as tap:
            method.backbone.predict_x0(x, t, method.prompts.conditioning(rows), FULL, denoiser=networks.fake)
            tokens = tap.take()
        return method.head(tokens.transpose(1, 2).reshape(4, -1, 4, 4))  # type: ignore[attr-defined, no-any-return]

    published = F.softplus(judged(student_x, student_t, matched.rows)).mean()
    published += F.softplus(-judged(real_x, real_t, real_rows)).mean()
    assert whole - plain == pytest.approx(1e-2 * float(published.detach()), rel=1e-4)
    seen.calls.clear()
    scores = Scores(method.score_sample(matched, Randomness(1)), matched.y.detach() + 1, matched.y.detach())
    loss, _ = method.generator_loss(matched, scores, Randomness(5))
    dmd, _ = super(type(method), method).generator_loss(matched, scores, Randomness(5))
    ((student_x, student_t),) = seen.calls
    expected = 5e-3 * F.softplus(-judged(student_x, student_t, matched.rows)).mean()
    assert float((loss - dmd).detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_dmd2s_fake_score_sees_times_beyond_the_students() -> None:
    method, _ = with_networks("dmd2", gan_weight=0.0)
    matched = matched_at([0] * 4)
    low, high = (method.score_sample(matched, Given(values(4, 8, 8, 8), u), critic=True).tau for u in (0.0, 1.0))
    assert float(low[0]) == pytest.approx(0.001) and float(high[0]) == pytest.approx(0.999)
    assert method.score_sample(matched, Given(values(4, 8, 8, 8), 1.0)).tau.tolist() == [0.98] * 4


# ---- SwD ------------------------------------------------------------------------------------------------------------


def test_swds_times_are_the_teachers_own_28_steps() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    settings = settings_for("swd")
    cascade = preset("swd-sd3")
    method = METHODS["swd"](make_method(settings).backbone, cascade, settings, make_method(settings).prompts, 1.0)
    torch.testing.assert_close(method.table, scheduler.sigmas[:-1].double(), rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]
    # train_sd35_medium.sh --boundaries 0 7 14 18 28: the cascade stands on these entries.
    assert [step.t for step in cascade.steps] == pytest.approx(
        [float(scheduler.sigmas[i]) for i in (0, 7, 14, 18)], abs=1e-4
    )
    matched = matched_at([3] * 400)
    entries = {round(float(scheduler.sigmas[i]), 4) for i in range(12, 28)}
    drawn = {round(t, 4) for t in method.draw_times(matched, Randomness(0)).tolist()}
    assert drawn == entries and max(drawn) == pytest.approx(0.7904, abs=1e-4)
    assert len({round(t, 4) for t in method.critic_times(matched, Randomness(0)).tolist()}) == 28


def test_swds_states_are_the_scale_before_enlarged_bicubically_and_noised() -> None:
    """src/utils/train_utils.py:123-160 and src/flow_matching_sampler.py:112-134."""
    method, networks = with_networks("swd")
    rollout = method.rollout(Randomness(4))
    (state,) = method.states(rollout, networks.student, [2])
    draws = Randomness(4)
    at = draws.integers(6, 4)
    samples = method.samples.latents  # type: ignore[attr-defined]
    sizes = [step.size for step in method.cascade.steps]
    enlarged = F.interpolate(samples[sizes[1]][at], size=6, mode=method.cascade.x0_upsampling)
    noise = draws.normal(enlarged.shape)
    torch.testing.assert_close(state.x_t, 0.5 * enlarged + 0.5 * noise)
    assert torch.equal(state.clean, samples[sizes[2]][at])  # type: ignore[arg-type]
    # The first scale starts from its own samples (train_utils.py:133-134).
    (state,) = method.states(method.rollout(Randomness(4)), networks.student, [0])
    assert state.x_t.shape[-1] == 4 and torch.equal(state.clean, samples[LOW][at])  # type: ignore[arg-type]


def test_swds_further_losses_compare_student_and_picture_under_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """src/losses.py:297-313 (GAN on the scores' sample), 319-360 (patch loss), 117-134 (discriminator)."""
    method, networks = with_networks("swd", guidance_scale=1.0)
    matched = matched_at([3, 3], clean=values(2, 8, 8, 8, seed=5))
    sample = method.score_sample(matched, Randomness(1))
    scores = Scores(sample, values(2, 8, 8, 8, seed=8), values(2, 8, 8, 8, seed=9))
    seen = Seen(method, monkeypatch)
    method.generator_loss(matched, scores, Randomness(2))
    (judged, judged_t), (real_x, real_t), (student_x, student_t) = seen.calls
    torch.testing.assert_close(judged, sample.x)
    assert torch.equal(judged_t, sample.tau)
    assert torch.equal(real_t, student_t) and float(real_t.max()) <= float(method.table[18])  # type: ignore[attr-defined]
    t = real_t.view(-1, 1, 1, 1)
    difference = (1 - t) * (matched.y.detach() - matched.clean)  # type: ignore[operator]
    torch.testing.assert_close(student_x - real_x, difference)
    seen.calls.clear()
    method.critic_loss(matched, networks.fake, Randomness(3))
    (student_x, student_t), (real_x, real_t) = seen.calls
    t = real_t.view(-1, 1, 1, 1)
    assert torch.equal(student_t, real_t)
    torch.testing.assert_close(student_x - real_x, (1 - t) * (matched.y.detach() - matched.clean))  # type: ignore[operator]


def test_swds_losses_add_up_as_published() -> None:
    """src/losses.py: 0.5 mse with the normaliser, GAN 5e-3, MMD 1; x0 error and GAN 1e-2 for the fake score."""
    method, _ = with_networks("swd", guidance_scale=1.0)
    matched = matched_at([3, 3], clean=values(2, 8, 8, 8, seed=5))
    sample = method.score_sample(matched, Randomness(1))
    scores = Scores(sample, values(2, 8, 8, 8, seed=8), values(2, 8, 8, 8, seed=9))
    loss, figures = method.generator_loss(matched, scores, Randomness(2))
    method.settings.gan_weight = method.settings.mmd_weight = 0.0
    dmd, _ = method.generator_loss(matched, scores, Randomness(2))
    parts = float(dmd.detach()) + 5e-3 * figures["gan_generator_loss"] + figures["patch_loss"]
    assert float(loss.detach()) == pytest.approx(parts, rel=1e-6)
    torch.testing.assert_close(method.fake_weights(matched, sample), torch.ones(2, dtype=F64))


def test_swds_head_narrows_in_four_linear_layers() -> None:
    """src/transformer_with_discriminator.py:37-48 on SD3.5-medium's width."""
    head = TokenHead(1536)
    shapes = [(layer.in_features, layer.out_features) for layer in head.layers if isinstance(layer, nn.Linear)]
    assert shapes == [(1536, 1152), (1152, 768), (768, 384), (384, 1)]
    kinds = [type(layer) for layer in head.layers]
    assert kinds == [nn.LayerNorm, nn.GELU, nn.Linear] * 4
    tokens = torch.randn(2, 5, 1536, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(tokens), head(tokens.mean(1, keepdim=True)))


# ---- the naive cascade ----------------------------------------------------------------------------------------------


def test_the_naive_cascade_is_matched_at_each_stages_own_side() -> None:
    method, networks = with_networks("naive")
    rollout = method.rollout(Randomness(1))
    for step, size in ((1, LOW), (3, FULL)):
        (matched,) = method.match(rollout.predict(networks.student, [rollout.roll_out(networks.student, step, 2)]))
        assert matched.size == size and matched.y.shape[-2:] == method.backbone.latent_shape(size)[-2:]
        sample = method.score_sample(matched, Randomness(2))
        assert torch.equal(sample.noise, sample.fresh)


def test_the_naive_cascades_times_lie_at_the_stages_own_side() -> None:
    naive, rmd = make_method(settings_for("naive")), make_method(settings_for("rmd"))
    boundary = float(rmd.intervals[0, 0])
    assert naive.intervals[2:].tolist() == rmd.intervals[2:].tolist()
    # Eq. 2 at half the side: 2 t / (1 + t), to the timestep.
    assert naive.intervals[0].tolist() == pytest.approx([2 * boundary / (1 + boundary), 0.98], abs=6e-4)


def test_published_steps_and_scales_are_the_default(tmp_path: Path) -> None:
    backbone = get_backbone("sd3").from_config(tiny_config("sd3"), dtype=torch.float32, device="meta")
    teacher = Teacher(tmp_path, backbone, 28, 7.0, {}, None)
    cascade = training_cascade(teacher, settings_for("swd"))
    assert [(step.timestep, step.size.width // 8) for step in cascade.steps] == [
        (1000, 64), (895.9, 80), (737.1, 96), (602.2, 128)
    ]  # fmt: skip
    listed = training_cascade(teacher, settings_for("tdm", timesteps=(899, 674, 449, 224)))
    assert [(step.timestep, step.size.width) for step in listed.steps] == [(t, 1024) for t in (899, 674, 449, 224)]
    scales = training_cascade(teacher, settings_for("swd", timesteps=(1000, 700, 400)))
    assert [(step.timestep, step.size.width) for step in scales.steps] == [(1000, 512), (700, 768), (400, 1024)]


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_rivals_file_says_what_its_method_defines(config: Path) -> None:
    settings = DistillSettings.read(config)
    if config.stem in METHODS:
        assert settings.method == config.stem
        defined = METHODS[settings.method].defaults
        assert {name: getattr(settings, name) for name in defined} == dict(defined)


def test_timesteps_are_for_methods_that_take_a_list() -> None:
    with pytest.raises(ValueError, match="timesteps are for tdm, dmd2 and swd"):
        settings_for("rmd", timesteps=(1000, 500))
    with pytest.raises(ValueError, match="timesteps are for tdm, dmd2 and swd"):
        settings_for("tdm", timesteps=(1000, 500), schedule="0+4")


def test_what_cannot_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="dmd2 draws the fake score's times by a law of its own"):
        settings_for("dmd2", shared_score_sample=True)
    with pytest.raises(ValueError, match=r"patch_entries=\[18, 29\]: give a first entry and an end within 0 and 28"):
        make_method(settings_for("swd", patch_entries=(18, 29)))
    with pytest.raises(ValueError, match="fake_first"):
        settings_for("tdm", shared_score_sample=True)
    with pytest.raises(ValueError, match="gan_weight is DMD2's and SwD's"):
        settings_for("rmd", gan_weight=0.1)
