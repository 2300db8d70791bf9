"""Distribution matching over a cascade: what RMD, TDM, DMD2 and SwD share.

An update goes: states (:mod:`training.distill.rollout`) -> the student's predictions, with gradient -> the same at the
side where they are matched (`match`) -> noised to a teacher's time -> real and fake score -> the generator's loss; then
the fake score's own denoising loss on the same predictions.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from rmd.cascade import Cascade
from rmd.size import Size
from rmd.upsampling import mix_noise, upsample, upsample_noise
from training.distill.figures import direction_figures
from training.distill.intervals import draw_times, faded_intensity, step_ends, tau_intervals
from training.distill.losses import (
    GENERATOR_LOSSES,
    dmd_direction,
    fake_score_loss,
    mean_snr_weight,
    normaliser,
    snr_weight,
    uncapped_snr,
    velocity_weight,
)
from training.distill.rollout import Prediction, Prompts, Rollout, State, X0Backbone
from training.distill.settings import DistillSettings
from training.runtime.attention import scoring_attention
from training.runtime.randomness import Randomness


@dataclass(frozen=True)
class Matched:
    """The student's predictions at the side where they are matched.

    Attributes:
        size: that side, in pixels.
        y: (B, C, [T], H, W), `U(x0)`; carries the student's gradient.
        eps: `U(eps_hat)`, detached.
        steps: (B,) step indices, on the CPU.
        rows: (B,) prompt rows.
    """

    size: Size
    y: Tensor
    eps: Tensor
    steps: Tensor
    rows: Tensor


@dataclass
class ScoreSample:
    """A noised `y`: what teacher and fake score see.

    Attributes:
        size: in pixels and frames.
        y: `matched.y`, or of a film the frames that are compared; carries the student's gradient.
        x: `alpha y + sigma eps_mix`, detached.
        tau: (B,) times on the teacher's axis, float64.
        frames: (B, T) numbers of the frames in `y`; all of them when None.
        fake: the fake score's x0 prediction with its own gradient, once it was made.
    """

    size: Size
    y: Tensor
    x: Tensor
    tau: Tensor
    frames: Tensor | None = None
    fake: Tensor | None = None


class DistillationMethod(abc.ABC):
    """One objective over student, teacher and fake score.

    Subclasses say where predictions are matched and may add losses. `generator_loss` never gives gradients to teacher
    or fake score, `critic_loss` never to the student.
    """

    name: ClassVar[str]

    def __init__(
        self, backbone: X0Backbone, cascade: Cascade, settings: DistillSettings, prompts: Prompts, guidance_scale: float
    ) -> None:
        self.backbone, self.settings, self.prompts = backbone, settings, prompts
        self.cascade = with_intensities(cascade, settings)
        self.guidance_scale = guidance_scale
        self.intervals = self._intervals()
        self._snr_means = self._mean_weights()
        self._generator_metric = GENERATOR_LOSSES[settings.loss]
        self._check()

    # ---- where predictions are matched ------------------------------------------------------------------------------

    @abc.abstractmethod
    def matched_size(self, size: Size) -> Size:
        """The side at which a prediction made at `size` is compared with the teacher."""

    def rollout(self, random: Randomness) -> Rollout:
        """The source of this method's states."""
        settings = self.settings
        return Rollout(
            self.backbone,
            self.cascade,
            self.prompts,
            random,
            settings.batch_size,
            settings.rollout,
            settings.draw,
        )

    def states(self, rollout: Rollout, student: nn.Module, active: Sequence[int]) -> list[State]:
        """The states that an update starts from."""
        return rollout.states(student, active)

    def active_steps(self, iteration: int) -> list[int]:
        """Steps that are trained in this update: the low stage alone during the warm-up, then all."""
        # The one or the other comes first, never both.
        start = self.settings.warm_start_iterations + self.settings.fake_warmup_iterations
        if start <= iteration < start + self.settings.low_stage_iterations:
            return [index for index, step in enumerate(self.cascade.steps) if step.stage == 0]
        return list(range(self.cascade.num_steps))

    def match(self, predictions: Sequence[Prediction]) -> list[Matched]:
        """Bring predictions to the side where they are matched: `y = U(x0)`, differentiable."""
        groups: dict[Size, list[Matched]] = {}
        for p in predictions:
            size = self.matched_size(p.size)
            shape = self.backbone.latent_shape(size)
            with torch.no_grad():
                eps = self.backbone.schedule.eps_from_x0(p.x_t, p.x0.detach(), p.t)
                eps = upsample_noise(eps, shape, self.cascade.noise_upsampling)
            y = upsample(p.x0, shape, self.cascade.x0_upsampling)
            groups.setdefault(size, []).append(Matched(size, y, eps, p.steps, p.rows))
        return [
            Matched(
                size,
                torch.cat([m.y for m in group]),
                torch.cat([m.eps for m in group]),
                torch.cat([m.steps for m in group]),
                torch.cat([m.rows for m in group]),
            )
            for size, group in groups.items()
        ]

    # ---- the noised sample ----------------------------------------------------------------------------------------

    def score_sample(self, matched: Matched, random: Randomness) -> ScoreSample:
        """Noise `y` to times drawn from each sample's interval, with the score's noise law (Eq. 10)."""
        y, predicted, size, frames = matched.y, matched.eps, matched.size, None
        count = self.settings.score_frames
        if count is not None and count < y.shape[2]:
            chosen = random.uniform(y.shape[2]).argsort()[:count].sort().values
            y, predicted, size = y[:, :, chosen], predicted[:, :, chosen], replace(size, num_frames=count)
            frames = chosen.expand(len(y), -1)
        low, high = self.intervals[matched.steps].to(y.device).unbind(1)
        shift = self.cascade.flow_shift if self.settings.interval == "trajectory" else 1.0
        tau = draw_times(low, high, random.uniform(len(matched.steps)), shift)
        intensity = self._score_intensity(matched, tau).to(y.device)
        noise = random.normal(y.shape)
        eps = noise if not bool(intensity.any()) else mix_noise(predicted, noise, intensity)
        return ScoreSample(size, y, self.backbone.schedule.add_noise(y.detach(), eps, tau), tau, frames)

    def _intervals(self) -> Tensor:
        intervals = tau_intervals(self.cascade, self.settings.interval, self.settings.interval_offsets)
        top = self.settings.max_tau
        if top is not None and bool((intervals[:, 0] >= top).any()):
            raise ValueError(f"max_tau={top} leaves step {int((intervals[:, 0] >= top).nonzero()[0])} no time to draw")
        return intervals if top is None else intervals.clamp(max=top)

    def _score_intensity(self, matched: Matched, tau: Tensor) -> Tensor:
        """`a` of each sample: the cascade's where a stage lies below the matched side, else 0 unless asked for.

        Under `score_noise=trajectory` it is what the sample has at its step's end, and fades from there.
        """
        steps = self.cascade.steps
        a = self.cascade.score_noise_intensity
        everywhere = self.settings.score_noise_everywhere
        per_step = [a if everywhere or step.size != self.matched_size(step.size) else 0.0 for step in steps]
        intensity = torch.tensor(per_step, dtype=torch.float64)[matched.steps]
        if self.settings.score_noise == "constant":
            return intensity
        ends = step_ends(self.cascade)[matched.steps]
        return faded_intensity(self.backbone.schedule, intensity, ends, tau.cpu())

    # ---- losses -----------------------------------------------------------------------------------------------------

    def generator_loss(
        self, matched: Matched, teacher: nn.Module | None, fake: nn.Module | None, sample: ScoreSample
    ) -> tuple[Tensor, dict[str, float]]:
        """The student's loss (Eq. 8 or the chosen metric), averaged over the batch.

        With `shared_score_sample` the fake score's prediction is kept in `sample`, with gradient, for its own loss.

        Returns:
            the loss, and figures to log: mean |d| and the loss of each step.
        """
        frames = {} if sample.frames is None else {"frame_numbers": sample.frames}
        conditioning = {**self.prompts.conditioning(matched.rows), **frames}
        uncond = None
        if self.guidance_scale != 1.0:
            uncond = {**self.prompts.unconditional(len(matched.rows)), **frames}
        with torch.no_grad(), scoring_attention():
            real = self.backbone.guided_x0(
                sample.x, sample.tau, conditioning, uncond, self.guidance_scale, sample.size, denoiser=teacher
            )
        with torch.set_grad_enabled(self.settings.shared_score_sample):
            predicted = self.backbone.predict_x0(sample.x, sample.tau, conditioning, sample.size, denoiser=fake)
        if self.settings.shared_score_sample:
            sample.fake = predicted
        d = dmd_direction(sample.y, real, predicted.detach())
        losses = self._generator_metric(d)
        if self.settings.normalise:
            losses = losses / normaliser(sample.y, real, self.settings.normaliser_floor)
        weighted = losses * self._sample_weights(matched).to(losses)
        figures = {"direction": float(d.detach().abs().mean()), **direction_figures(d.detach(), sample.tau)}
        for step in torch.unique(matched.steps).tolist():
            figures[f"generator_loss_step_{step}"] = float(losses.detach()[matched.steps == step].mean())
        return weighted.mean(), figures

    def critic_loss(
        self, matched: Matched, fake: nn.Module | None, random: Randomness, sample: ScoreSample | None = None
    ) -> Tensor:
        """The fake score's denoising loss (Eq. 9) on the student's detached predictions.

        Args:
            sample: the generator's own, to be used again; otherwise time and noise are drawn afresh.
        """
        sample = sample if sample is not None else self.score_sample(matched, random)
        predicted = sample.fake
        if predicted is None:
            conditioning = self.prompts.conditioning(matched.rows)
            if sample.frames is not None:
                conditioning["frame_numbers"] = sample.frames
            predicted = self.backbone.predict_x0(sample.x, sample.tau, conditioning, sample.size, denoiser=fake)
        return fake_score_loss(predicted, sample.y, self._fake_weights(matched, sample.tau))

    def warm_start_loss(
        self,
        predictions: Sequence[Prediction],
        teacher: nn.Module | None,
        random: Randomness,
    ) -> Tensor:
        """Regression of the guided teacher on the student's own states (ours, not the paper's).

        At a step of the matched side the teacher sees the student's very state, which is guidance distillation. Below
        it, the teacher sees the student's prediction lifted by U and noised to the step's time on the teacher's axis,
        so that the target is what the teacher makes of this sample at its own side. A first step has no signal to
        lift (the noise's share is all), so its target is the teacher's mean picture.
        """
        total: Tensor | None = None
        count = sum(len(p.steps) for p in predictions)
        for p in predictions:
            size = self.matched_size(p.size)
            conditioning = self.prompts.conditioning(p.rows)
            uncond = self.prompts.unconditional(len(p.rows)) if self.guidance_scale != 1.0 else None
            y = upsample(p.x0, self.backbone.latent_shape(size), self.cascade.x0_upsampling)
            if size == p.size:
                x, t = p.x_t, p.t
            else:
                teacher_times = [self.cascade.steps[int(i)].teacher_timestep / 1000 for i in p.steps]
                t = torch.tensor(teacher_times, dtype=torch.float64, device=y.device)
                x = self.backbone.schedule.add_noise(y.detach(), random.normal(y.shape), t)
            with torch.no_grad(), scoring_attention():
                target = self.backbone.guided_x0(
                    x, t, conditioning, uncond, self.guidance_scale, size, denoiser=teacher
                )
            loss = (y - target).square().flatten(1).mean(1).sum() / count
            total = loss if total is None else total + loss
        if total is None:
            raise ValueError("no predictions to regress")
        return total

    # ---- weights ----------------------------------------------------------------------------------------------------

    def _sample_weights(self, matched: Matched) -> Tensor:
        weights = torch.ones(self.cascade.num_steps, dtype=torch.float64)
        if self.settings.stage_weights is not None:
            weights *= torch.tensor([self.settings.stage_weights[step.stage] for step in self.cascade.steps])
        if self.settings.importance_weight:
            # Steps are drawn evenly; times uniform over the whole axis would meet each as often as it is long.
            length = self.intervals[:, 1] - self.intervals[:, 0]
            weights *= length / length.mean()
        return weights[matched.steps]

    def _fake_weights(self, matched: Matched, tau: Tensor) -> Tensor:
        if self.settings.fake_weighting == "none":
            return torch.ones_like(tau)
        if self.settings.fake_weighting == "velocity":
            return velocity_weight(self.backbone.schedule, tau)
        if self.settings.fake_weighting == "uncapped_snr":
            return uncapped_snr(self.backbone.schedule, tau)
        scales = torch.tensor([self._scale(step.size) for step in self.cascade.steps], dtype=torch.float64)
        weight = snr_weight(self.backbone.schedule, tau.cpu(), scales[matched.steps]) / self._snr_means[matched.steps]
        return weight.to(tau.device)

    def _mean_weights(self) -> Tensor:
        """The mean SNR weight over each step's stage (or own) interval."""
        means = [
            mean_snr_weight(self.backbone.schedule, float(low), float(high), self._scale(step.size))
            for step, (low, high) in zip(self.cascade.steps, self.intervals.tolist(), strict=True)
        ]
        if self.settings.interval == "step":
            # One mean a stage, as the paper's weight has it: a step's own mean would undo the weighting between steps.
            for stage in self.cascade.stages:
                at = [index for index, step in enumerate(self.cascade.steps) if step.stage == stage.index]
                shared = sum(means[index] for index in at) / len(at)
                for index in at:
                    means[index] = shared
        return torch.tensor(means, dtype=torch.float64)

    def _scale(self, size: Size) -> float:
        return self.matched_size(size).short_side / size.short_side

    def _check(self) -> None:
        if self.settings.rollout == "pipelined":
            self.rollout(Randomness(0)).counts(range(self.cascade.num_steps))
        if self.settings.score_frames is not None and not self.backbone.takes_frame_numbers:
            raise ValueError("score_frames: this backbone's network cannot be told which frames it sees; leave it out")
        weights = self.settings.stage_weights
        if weights is not None and len(weights) != len(self.cascade.stages):
            raise ValueError(
                f"stage_weights has {len(weights)} values, but the cascade {self.cascade.schedule_name} has "
                f"{len(self.cascade.stages)} stages"
            )


def with_intensities(cascade: Cascade, settings: DistillSettings) -> Cascade:
    """The cascade with the noise intensities that the settings give for training."""
    if settings.score_noise_intensity is not None:
        cascade = replace(cascade, score_noise_intensity=settings.score_noise_intensity)
    if settings.transition_noise_intensity is not None:
        cascade = replace(cascade, training_noise_intensity=settings.transition_noise_intensity)
    if settings.step_noise_intensity is not None:
        cascade = replace(cascade, training_step_noise_intensity=settings.step_noise_intensity)
    return cascade
