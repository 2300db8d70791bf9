"""The methods on tiny real networks: who gets gradients, from where, on which intervals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmd.backbones.embedded_video import EmbeddedVideoBackbone
from rmd.backbones.tiny import tiny_config
from rmd.cascade import Cascade
from rmd.noise_schedule import RectifiedFlow
from rmd.sampler import advance, needs_noise
from rmd.size import Size
from tests.training.distil_setup import (
    FULL,
    LOW,
    attach_samples,
    cascade_for,
    make_method,
    prompt_set,
    settings_for,
    tiny_backbone,
)
from training.distill.intervals import tau_intervals
from training.distill.methods import METHODS as METHOD_CLASSES
from training.distill.methods.base import DistributionMatching, Matched, Scores, ScoreSample
from training.distill.methods.warm_start import warm_start_loss
from training.distill.prompts import PromptSet
from training.distill.roles import Networks
from training.distill.rollout import Rollout, State
from training.runtime.randomness import Randomness

METHODS = ["rmd", "tdm", "dmd2", "swd", "naive"]


def prepared(method_name: str, **options: Any) -> tuple[DistributionMatching, Networks, Randomness]:
    settings = settings_for(method_name, **options)
    method = make_method(settings)
    networks = Networks.build(method.backbone, settings)  # type: ignore[arg-type]
    nudge(networks.student)
    if method.needs_samples:
        attach_samples(method, networks)
    return method, networks, Randomness(1)


@torch.no_grad()
def nudge(module: nn.Module) -> None:
    """Move a network a little, so that student and fake score differ from the teacher."""
    for index, parameter in enumerate(module.parameters()):
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))


def matched_of(method: DistributionMatching, networks: Networks, random: Randomness) -> list[Matched]:
    rollout = method.rollout(random)
    states = method.states(rollout, networks.student, range(method.cascade.num_steps))
    return method.match(rollout.predict(networks.student, states))


def scores_of(method: DistributionMatching, networks: Networks, matched: Matched, random: Randomness) -> Scores:
    return method.scores(matched, method.score_sample(matched, random), networks.teacher, networks.fake)


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None and bool(p.grad.any())]


@pytest.mark.parametrize("name", METHODS)
def test_the_generators_loss_is_finite_and_trains_the_student_alone(name: str) -> None:
    method, networks, random = prepared(name, rollout="fresh")
    (matched,) = matched_of(method, networks, random)
    loss, figures = method.generator_loss(matched, scores_of(method, networks, matched, random), random)
    assert torch.isfinite(loss) and figures["direction"] > 0
    loss.backward()
    assert gradients(networks.student)
    assert not gradients(networks.teacher)
    # The further losses go through the fake network to reach the student; the trainer drops what they leave there.
    assert name in ("dmd2", "swd") or not gradients(networks.fake)


@pytest.mark.parametrize(("name", "shared"), [*((name, False) for name in METHODS), ("rmd", True), ("naive", True)])
def test_the_critics_loss_is_finite_and_trains_the_fake_score_alone(name: str, shared: bool) -> None:
    method, networks, random = prepared(name, shared_score_sample=shared, rollout="fresh")
    (matched,) = matched_of(method, networks, random)
    scores = scores_of(method, networks, matched, random)
    method.generator_loss(matched, scores, random)
    loss = method.critic_loss(matched, networks.fake, random, scores if shared else None)
    assert torch.isfinite(loss)
    loss.backward()
    assert gradients(networks.fake)
    assert not gradients(networks.student) and not gradients(networks.teacher)


def test_dmd2s_gan_loss_reaches_student_and_head() -> None:
    method, networks, random = prepared("dmd2", gan_weight=1.0, guidance_scale=1.0)
    (matched,) = matched_of(method, networks, random)
    _, figures = method.generator_loss(matched, scores_of(method, networks, matched, random), random)
    assert figures["gan_generator_loss"] > 0
    method.critic_loss(matched, networks.fake, random).backward()
    assert gradients(method.head)  # type: ignore[attr-defined]


def test_a_low_stages_gradient_comes_through_the_upsampling() -> None:
    method, networks, random = prepared("rmd")
    rollout = method.rollout(random)
    predictions = rollout.predict(networks.student, [rollout.roll_out(networks.student, 1, 2)])
    assert predictions[0].x0.shape[-2:] == (4, 4)
    predictions[0].x0.retain_grad()
    (matched,) = method.match(predictions)
    assert matched.size == FULL and matched.y.shape[-2:] == (8, 8)
    loss, _ = method.generator_loss(matched, scores_of(method, networks, matched, random), random)
    loss.backward()
    gradient = predictions[0].x0.grad
    assert gradient is not None and bool((gradient != 0).all())
    assert gradients(networks.student)


def test_only_a_low_stage_gets_predicted_noise_into_the_score() -> None:
    method, networks, _ = prepared("rmd", score_noise_intensity=1.0)
    for step, size in ((0, LOW), (2, FULL)):
        rollout = method.rollout(Randomness(4))
        (matched,) = method.match(rollout.predict(networks.student, [rollout.roll_out(networks.student, step, 2)]))
        sample = method.score_sample(matched, Randomness(5))
        tau = sample.tau[0].item()
        eps = (sample.x[0] - (1 - tau) * matched.y[0].detach()) / tau
        predicted = torch.allclose(eps, matched.eps[0], atol=1e-4)
        assert predicted == (size == LOW)


def test_stage_intervals_are_disjoint_and_clipped() -> None:
    cascade = cascade_for("rmd")
    stage = tau_intervals(cascade, "stage").tolist()
    assert stage[0] == stage[1] and stage[2] == stage[3]
    assert stage[0][1] == 0.98 and stage[3][0] == 0.02
    assert stage[0][0] == stage[2][1] == pytest.approx(cascade.stages[0].teacher_interval[0])
    assert tau_intervals(cascade, "step").tolist() == [[0.75, 0.98], [0.5, 0.75], [0.25, 0.5], [0.02, 0.25]]
    assert tau_intervals(cascade, "full").tolist() == [[0.02, 0.98]] * 4
    with pytest.raises(ValueError, match="interval 'half'"):
        tau_intervals(cascade, "half")


def test_times_are_drawn_from_each_samples_own_interval() -> None:
    method, networks, random = prepared("rmd", interval="step", rollout="pipelined", batch_size=64)
    (matched,) = matched_of(method, networks, random)
    assert sorted(set(matched.steps.tolist())) == [0, 1, 2, 3]
    tau = method.score_sample(matched, random).tau
    low, high = method.intervals[matched.steps].unbind(1)
    assert bool(((tau >= low) & (tau <= high)).all())


def test_the_warm_up_trains_the_low_stage_alone() -> None:
    method = make_method(settings_for(low_stage_iterations=3, warm_start_iterations=2, warm_start_fake_iterations=1))
    assert [method.active_steps(i) for i in range(7)] == [[0, 1, 2, 3]] * 2 + [[0, 1]] * 3 + [[0, 1, 2, 3]] * 2


def test_fresh_roll_outs_reach_every_step_and_pipelined_batches_hold_all() -> None:
    method, networks, _ = prepared("rmd")
    fresh = Rollout(method.backbone, method.cascade, prompt_set(), Randomness(0), 2)
    seen = {fresh.states(networks.student, range(4))[0].step for _ in range(30)}
    assert seen == {0, 1, 2, 3}
    pipelined = Rollout(method.backbone, method.cascade, prompt_set(), Randomness(0), 6, "pipelined")
    states = pipelined.states(networks.student, range(4))
    assert [(state.step, len(state.rows)) for state in states] == [(0, 2), (1, 2), (2, 1), (3, 1)]


def uneven() -> Cascade:
    """1+3: Eq. 6 gives the first step half of the samples."""
    return Cascade.from_steps("tiny", [1000, 750, 500, 250], [LOW, FULL, FULL, FULL], resolution_map="none")


def test_steps_are_drawn_by_stage_or_all_alike() -> None:
    backbone, networks = tiny_backbone(), prepared("rmd")[1]
    for draw, mode, expected in (
        ("stage", "fresh", [1 / 2, 1 / 6, 1 / 6, 1 / 6]),
        ("step", "fresh", [1 / 4] * 4),
        ("stage", "mixed", [1 / 2, 1 / 6, 1 / 6, 1 / 6]),
        ("stage", "stage", [1 / 2, 1 / 6, 1 / 6, 1 / 6]),
    ):
        rollout = Rollout(backbone, uneven(), prompt_set(), Randomness(0), 3, mode, draw)  # type: ignore[arg-type]
        counts = torch.zeros(4)
        for _ in range(600):
            for step, count in rollout.drawn(range(4)).items():
                counts[step] += count
        torch.testing.assert_close(counts / counts.sum(), torch.tensor(expected), atol=0.06, rtol=0)
    pipelined = Rollout(backbone, uneven(), prompt_set(), Randomness(0), 7, "pipelined")
    states = pipelined.states(networks.student, range(4))
    assert [(state.step, len(state.rows)) for state in states] == [(0, 4), (1, 1), (2, 1), (3, 1)]


def test_a_mixed_batch_is_the_samples_of_each_steps_own_roll_out() -> None:
    """One pass over the cascade, from which every sample leaves at its step; the low-stage warm-up holds one stage."""
    method, networks, _ = prepared("rmd", transition_noise_intensity=1.0, batch_size=5, rollout="mixed")
    rollout = method.rollout(Randomness(3))
    states = rollout.states(networks.student, range(4))
    assert sum(len(state.rows) for state in states) == 5 and len(states) >= 3
    draws = Randomness(3)
    rows, start = prompt_set().draw(draws, 5), draws.normal((5, *method.backbone.latent_shape(LOW)))
    torch.testing.assert_close(torch.cat([state.rows for state in states]), rows)
    seen = 0
    for state in states:
        mine = slice(seen, seen + len(state.rows))
        x, text = start[mine], prompt_set().conditioning(rows[mine])
        for index in range(state.step):
            step = method.cascade.steps[index]
            t = torch.full((len(x),), step.t, dtype=torch.float64)
            with torch.no_grad():
                x0 = method.backbone.predict_x0(x, t, text, step.size, denoiser=networks.student)
            x = advance(
                method.cascade, index, x, x0, method.backbone.schedule, method.backbone.latent_shape, training=True
            )
        torch.testing.assert_close(state.x_t, x, rtol=1e-4, atol=1e-5)
        seen += len(state.rows)
    one = method.rollout(Randomness(3))
    one.mode = "stage"
    for _ in range(4):
        stages = {method.cascade.steps[state.step].stage for state in one.states(networks.student, range(4))}
        assert len(stages) == 1
    assert {state.step for state in rollout.states(networks.student, [0, 1])} == {0, 1}


def test_roll_outs_take_the_cascades_list_of_intensities_start_and_enlargement() -> None:
    """The student's own sampler, step for step, with the roll-out's draws."""
    method, networks, _ = prepared("rmd")
    cascade = replace(
        method.cascade, step_noise_intensity=(0.3, 0.0, 0.6), training_noise_intensity=0.2, x0_upsampling="bicubic",
        initial_noise_scale=0.9,
    )  # fmt: skip
    state = Rollout(method.backbone, cascade, prompt_set(), Randomness(3), 2).roll_out(networks.student, 3, 2)
    draws, backbone = Randomness(3), method.backbone
    rows = prompt_set().draw(draws, 2)
    x = 0.9 * draws.normal((2, *backbone.latent_shape(LOW)))
    for index, (a, b) in enumerate(((0.3, 0.91), (0.2, 0.96), (0.6, 0.64))):
        step, following = cascade.steps[index : index + 2]
        t = torch.full((2,), step.t, dtype=torch.float64)
        with torch.no_grad():
            x0 = backbone.predict_x0(x, t, prompt_set().conditioning(rows), step.size, denoiser=networks.student)
        eps = backbone.schedule.eps_from_x0(x, x0, step.t)
        if step.size != following.size:
            x0 = torch.nn.functional.interpolate(x0, scale_factor=2, mode="bicubic")
            eps = torch.nn.functional.interpolate(eps, scale_factor=2, mode="bilinear")
        noise = draws.normal((2, *backbone.latent_shape(following.size)))
        x = backbone.schedule.add_noise(x0, a * eps + b**0.5 * noise, following.t)
    torch.testing.assert_close(state.x_t, x, rtol=0, atol=1e-5)


def test_a_pipelined_sample_moves_on_by_its_own_prediction() -> None:
    method, networks, random = prepared("rmd", rollout="pipelined", transition_noise_intensity=1.0)
    rollout = method.rollout(random)
    states = rollout.states(networks.student, range(4))
    predictions = rollout.predict(networks.student, states)
    assert not any(needs_noise(method.cascade, step, training=True) for step in range(4))
    by_step = {}
    for prediction in predictions:
        for index, step in enumerate(prediction.steps.tolist()):
            by_step[step] = (prediction.x_t[index : index + 1], prediction.x0[index : index + 1].detach())
    following = rollout.states(networks.student, range(4))
    for step in (0, 1, 2):
        expected = advance(
            method.cascade, step, *by_step[step], method.backbone.schedule, method.backbone.latent_shape, training=True
        )
        torch.testing.assert_close(following[step + 1].x_t, expected)
        assert following[step + 1].rows.tolist() == states[step].rows.tolist()


def test_a_shared_sample_gives_the_critic_the_generators_own_prediction() -> None:
    method, networks, random = prepared("rmd", shared_score_sample=True)
    (matched,) = matched_of(method, networks, random)
    scores = scores_of(method, networks, matched, random)
    again = method.backbone.predict_x0(
        scores.sample.x, scores.sample.tau, method.prompts.conditioning(matched.rows), FULL, denoiser=networks.fake
    )
    torch.testing.assert_close(scores.fake, again)
    assert scores.fake.requires_grad and not scores.real.requires_grad


def test_the_warm_start_regresses_the_guided_teacher() -> None:
    method, networks, random = prepared("rmd", guidance_scale=3.0)
    method.guidance_scale = 3.0
    rollout = method.rollout(random)
    predictions = rollout.predict(networks.student, [State(3, torch.randn(2, 8, 8, 8), torch.tensor([0, 1]))])
    loss = warm_start_loss(method, predictions, networks.teacher, random)
    target = method.backbone.guided_x0(
        predictions[0].x_t, predictions[0].t, method.prompts.conditioning(torch.tensor([0, 1])),
        method.prompts.unconditional(2), 3.0, FULL, denoiser=networks.teacher,
    )  # fmt: skip
    torch.testing.assert_close(loss, (predictions[0].x0 - target).square().mean())
    loss.backward()
    assert gradients(networks.student) and not gradients(networks.teacher)


def test_swd_starts_from_clean_samples_of_the_scale_before() -> None:
    method, networks, random = prepared("swd")
    rollout = method.rollout(random)
    (state,) = method.states(rollout, networks.student, [3])
    assert state.x_t.shape[-2:] == (8, 8)
    (prediction,) = rollout.predict(networks.student, [state])
    (matched,) = method.match([prediction])
    assert matched.size == FULL
    (state,) = method.states(rollout, networks.student, [2])
    (matched,) = method.match(rollout.predict(networks.student, [state]))
    assert matched.size.width == 48, "each scale is matched at its own side"


def test_fake_weights_average_one_over_a_stage() -> None:
    method, networks, random = prepared("rmd", rollout="pipelined")
    (matched,) = matched_of(method, networks, random)
    for step in range(4):
        low, high = method.intervals[step].tolist()
        tau = torch.linspace(low, high, 4001, dtype=torch.float64)
        steps = torch.full((4001,), step)
        stage = Matched(FULL, matched.y, matched.eps, steps, steps)
        assert float(
            method.fake_weights(stage, ScoreSample(FULL, matched.y, matched.y, tau, matched.eps, matched.eps)).mean()
        ) == pytest.approx(1.0, rel=1e-2)


def test_a_one_resolution_method_refuses_a_cascade_of_two() -> None:
    with pytest.raises(ValueError, match="tdm works at one resolution"):
        from training.distill.methods import TDM

        TDM(tiny_backbone(), cascade_for("rmd"), settings_for("tdm"), prompt_set(), 1.0)


def test_a_pipelined_batch_smaller_than_the_cascade_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 3 on a device would never train step 3; give more"):
        make_method(settings_for(rollout="pipelined", batch_size=3))


def test_stage_weights_must_fit_the_stages() -> None:
    with pytest.raises(ValueError, match="stage_weights has 3 values"):
        make_method(settings_for(stage_weights=(1.0, 1.0, 1.0)))


FILM_LOW, FILM = Size(32, 32, 5), Size(48, 48, 5)


def film_method(frames: int | None) -> tuple[DistributionMatching, Networks]:
    backbone = EmbeddedVideoBackbone.from_config(tiny_config("embedded-video"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    text = {
        "encoder_hidden_states": torch.randn(4, 24, 32, generator=generator),
        "pooled_projections": torch.randn(4, 32, generator=generator),
    }
    given, none = ({name: value[rows] for name, value in text.items()} for rows in (slice(3), slice(3, 4)))
    cascade = Cascade.from_thresholds("tiny", RectifiedFlow(), (FILM_LOW, FILM), [1000, 750, 500, 250], (-1.5,))
    settings = settings_for("rmd", score_frames=frames, shared_score_sample=True, rollout="pipelined")
    rows = PromptSet(["one", "two", "three"], given, none)
    networks = Networks.build(backbone, settings)
    nudge(networks.student)
    return METHOD_CLASSES["rmd"](backbone, cascade, settings, rows, 2.0), networks


def test_scores_see_some_frames_of_a_film_and_are_told_which() -> None:
    method, networks = film_method(3)
    random = Randomness(1)
    (matched,) = matched_of(method, networks, random)
    matched.y.retain_grad()
    seen: list[list[list[int]]] = []
    for network in (networks.teacher, networks.fake):
        network.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(kwargs["frame_numbers"].tolist()), with_kwargs=True
        )
    sample = method.score_sample(matched, random)
    assert sample.x.shape[2] == 3 and sample.size == Size(48, 48, 3) and sample.frames is not None
    scores = method.scores(matched, sample, networks.teacher, networks.fake)
    loss, _ = method.generator_loss(matched, scores, random)
    loss.backward()  # type: ignore[no-untyped-call]
    (chosen,) = {tuple(row) for call in seen for row in call}
    assert chosen == tuple(sample.frames[0].tolist()) == tuple(sorted(set(chosen)))
    touched = matched.y.grad.abs().sum((0, 1, 3, 4)) > 0  # type: ignore[union-attr]
    assert touched.nonzero().flatten().tolist() == list(chosen)
    method.critic_loss(matched, networks.fake, random, scores).backward()  # type: ignore[no-untyped-call]
    assert gradients(networks.fake)
    others = {tuple(method.score_sample(matched, random).frames[0].tolist()) for _ in range(20)}  # type: ignore[index]
    assert len(others) > 3


def test_as_many_frames_as_there_are_is_the_whole_film() -> None:
    losses = []
    for frames in (None, 5):
        method, networks = film_method(frames)
        random = Randomness(1)
        (matched,) = matched_of(method, networks, random)
        losses.append(
            float(method.generator_loss(matched, scores_of(method, networks, matched, random), random)[0].detach())
        )
    assert losses[0] == losses[1]


def test_score_frames_is_for_film_networks_that_can_be_told() -> None:
    with pytest.raises(ValueError, match="cannot be told which frames"):
        make_method(settings_for("rmd", score_frames=3))
    with pytest.raises(ValueError, match="has a further loss, on whole films"):
        settings_for("dmd2", score_frames=3)
