"""Distribution matching over a cascade: what RMD, TDM, DMD2, SwD and the naive cascade share.

An update goes: states (:mod:`training.distill.rollout`) -> the student's predictions, with gradient -> the same at the
side where they are matched (`match`) -> noised to a teacher's time (`score_sample`) -> real and fake score (`scores`)
-> the generator's loss; then the fake score's own denoising loss on the same predictions. Each method's file says what
of this it defines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rmd.cascade import Cascade
from rmd.size import Size
from rmd.upsampling import mix_noise, upsample, upsample_noise
from training.distill.figures import direction_figures
from training.distill.intervals import draw_times, tau_intervals
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
from training.runtime.attention import scoring_attention
from training.runtime.randomness import Randomness

if TYPE_CHECKING:  # the settings read each method's defaults
    from training.distill.settings import DistillSettings


@dataclass(frozen=True)
class Matched:
    """The student's predictions at the side where they are matched.

    Attributes:
        size: that side, in pixels.
        y: (B, C, [T], H, W), `U(x0)`; carries the student's gradient.
        eps: `U(eps_hat)`, detached.
        steps: (B,) step indices, on the CPU.
        rows: (B,) prompt rows.
        clean: clean latents of the same prompts and size, where the method starts from such.
    """

    size: Size
    y: Tensor
    eps: Tensor
    steps: Tensor
    rows: Tensor
    clean: Tensor | None = None


@dataclass(frozen=True)
class ScoreSample:
    """A noised `y`: what teacher and fake score see.

    Attributes:
        size: in pixels and frames.
        y: `matched.y`, or of a film the frames that are compared; carries the student's gradient.
        x: `alpha y + sigma eps_mix`, detached.
        tau: (B,) times on the teacher's axis, float64.
        noise: `eps_mix`.
        fresh: the fresh noise in it.
        frames: (B, T) numbers of the frames in `y`; all of them when None.
    """

    size: Size
    y: Tensor
    x: Tensor
    tau: Tensor
    noise: Tensor
    fresh: Tensor
    frames: Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """What the two scores make of one sample.

    Attributes:
        sample: what they saw.
        real: the guided teacher's x0.
        fake: the fake score's x0; with the fake score's own gradient under `shared_score_sample`.
    """

    sample: ScoreSample
    real: Tensor
    fake: Tensor


@dataclass(frozen=True)
class CleanSamples:
    """Clean latents that a method trains on.

    Attributes:
        latents: (N, C, [T], H, W) at each size that the method asks for.
        rows: (N,) their prompts' rows.
    """

    latents: Mapping[Size, Tensor]
    rows: Tensor


class DistributionMatching:
    """One objective over student, teacher and fake score.

    Subclasses say where predictions are matched, which defaults make them what they are, and may add losses.
    `generator_loss` never gives gradients to the teacher, `critic_loss` never to the student.
    """

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings that define the method, where they differ from the general ones."""
    one_size: ClassVar[bool] = False  # whether it knows a single resolution only

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

    # ---- what a method may need besides the three networks ---------------------------------------------------------

    @property
    def needs_samples(self) -> bool:
        """Whether it trains on clean samples; if so, :meth:`attach` is called before anything else."""
        return False

    @property
    def sample_sizes(self) -> tuple[Size, ...]:
        """The sizes at which it needs them."""
        return (self.cascade.full_size,)

    def attach(self, fake: nn.Module, samples: CleanSamples | None) -> None:
        """Take what a method with samples needs.

        Args:
            fake: the fake score network.
            samples: None where the run is only exported.
        """

    def critic_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained with the fake score's, by name (a discriminator's)."""
        return {}

    # ---- where predictions are matched ------------------------------------------------------------------------------

    def matched_size(self, size: Size) -> Size:
        """The side at which a prediction made at `size` is compared with the teacher; its own in most methods."""
        return size

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
            groups.setdefault(size, []).append(Matched(size, y, eps, p.steps, p.rows, p.clean))
        return [
            Matched(
                size,
                torch.cat([m.y for m in group]),
                torch.cat([m.eps for m in group]),
                torch.cat([m.steps for m in group]),
                torch.cat([m.rows for m in group]),
                group[0].clean,  # of one step, hence one size, hence one prediction
            )
            for size, group in groups.items()
        ]

    # ---- the noised sample ----------------------------------------------------------------------------------------

    def _intervals(self) -> Tensor:
        """(steps, 2) float64: from where to where the generator's `tau` is drawn for each step."""
        intervals = tau_intervals(self.cascade, self.settings.interval, self.settings.interval_offsets)
        top = self.settings.max_tau
        if top is not None and bool((intervals[:, 0] >= top).any()):
            raise ValueError(f"max_tau={top} leaves step {int((intervals[:, 0] >= top).nonzero()[0])} no time to draw")
        return intervals if top is None else intervals.clamp(max=top)

    def draw_times(self, matched: Matched, random: Randomness) -> Tensor:
        """(B,) float64, `tau` of each sample: uniform on its step's interval."""
        low, high = self.intervals[matched.steps].to(matched.y.device).unbind(1)
        shift = self.cascade.flow_shift if self.settings.interval == "trajectory" else 1.0
        return draw_times(low, high, random.uniform(len(matched.steps)), shift)

    def critic_times(self, matched: Matched, random: Randomness) -> Tensor:
        """The same for the fake score's own loss, where a method draws them otherwise."""
        return self.draw_times(matched, random)

    def score_sample(self, matched: Matched, random: Randomness, critic: bool = False) -> ScoreSample:
        """Noise `y` to the generator's or the critic's times, with the score's noise law (Eq. 10)."""
        y, predicted, size, frames = matched.y, matched.eps, matched.size, None
        count = self.settings.score_frames
        if count is not None and count < y.shape[2]:
            chosen = random.uniform(y.shape[2]).argsort()[:count].sort().values
            y, predicted, size = y[:, :, chosen], predicted[:, :, chosen], replace(size, num_frames=count)
            frames = chosen.expand(len(y), -1)
        tau = self.critic_times(matched, random) if critic else self.draw_times(matched, random)
        intensity = self.score_intensity(matched, tau).to(y.device)
        fresh = random.normal(y.shape)
        noise = fresh if not bool(intensity.any()) else mix_noise(predicted, fresh, intensity)
        x = self.backbone.schedule.add_noise(y.detach(), noise, tau)
        return ScoreSample(size, y, x, tau, noise, fresh, frames)

    def score_intensity(self, matched: Matched, tau: Tensor) -> Tensor:
        """(B,) float64, `a` of Eq. 10 in the scores' sample; fresh noise (0) unless a method says otherwise."""
        return torch.zeros(len(matched.steps), dtype=torch.float64)

    # ---- losses -----------------------------------------------------------------------------------------------------

    def scores(
        self, matched: Matched, sample: ScoreSample, teacher: nn.Module | None, fake: nn.Module | None
    ) -> Scores:
        """Both scores of a noised sample. Under `shared_score_sample` the fake one has its own gradient."""
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
            predicted = self.fake_x0(matched, sample, fake)
        return Scores(sample, real, predicted)

    def fake_x0(self, matched: Matched, sample: ScoreSample, fake: nn.Module | None) -> Tensor:
        """The fake score's x0 of a noised sample."""
        conditioning = self.prompts.conditioning(matched.rows)
        if sample.frames is not None:
            conditioning["frame_numbers"] = sample.frames
        return self.backbone.predict_x0(sample.x, sample.tau, conditioning, sample.size, denoiser=fake)

    def generator_loss(self, matched: Matched, scores: Scores, random: Randomness) -> tuple[Tensor, dict[str, float]]:
        """The student's loss (Eq. 8 or the chosen metric), averaged over the batch.

        Args:
            random: for losses that draw more than the scores' sample.

        Returns:
            the loss, and figures to log: mean |d| and the loss of each step.
        """
        y = scores.sample.y
        d = dmd_direction(y, scores.real, scores.fake.detach())
        losses = self._generator_metric(d)
        if self.settings.normalise:
            losses = losses / normaliser(y, scores.real, self.settings.normaliser_floor)
        weighted = losses * self._stage_weights(matched).to(losses)
        figures = {"direction": float(d.detach().abs().mean()), **direction_figures(d.detach(), scores.sample.tau)}
        for step in torch.unique(matched.steps).tolist():
            figures[f"generator_loss_step_{step}"] = float(losses.detach()[matched.steps == step].mean())
        return weighted.mean(), figures

    def critic_loss(
        self, matched: Matched, fake: nn.Module | None, random: Randomness, shared: Scores | None = None
    ) -> Tensor:
        """The fake score's denoising loss (Eq. 9) on the student's detached predictions.

        Args:
            shared: the scores of the generator's own loss, the fake one with gradient, to be used again; otherwise
                time and noise are drawn afresh.
        """
        if shared is not None:
            sample, predicted = shared.sample, shared.fake
        else:
            sample = self.score_sample(matched, random, critic=True)
            predicted = self.fake_x0(matched, sample, fake)
        return fake_score_loss(predicted, sample.y, self.fake_weights(matched, sample))

    # ---- weights ----------------------------------------------------------------------------------------------------

    def _stage_weights(self, matched: Matched) -> Tensor:
        weights = self.settings.stage_weights
        if weights is None:
            return torch.ones(len(matched.steps), dtype=torch.float64)
        per_step = [weights[step.stage] for step in self.cascade.steps]
        return torch.tensor(per_step, dtype=torch.float64)[matched.steps]

    def fake_weights(self, matched: Matched, sample: ScoreSample) -> Tensor:
        """(B,) weights of the squared x0 errors in the fake score's loss."""
        tau = sample.tau
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
        if self.one_size and len(self.cascade.sizes) > 1:
            raise ValueError(
                f"{self.name} works at one resolution; the cascade {self.cascade.schedule_name} has "
                f"{len(self.cascade.sizes)}: give a schedule such as 0+4"
            )
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
