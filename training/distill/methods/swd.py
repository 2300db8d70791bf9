"""SwD: scale-wise distillation, one step a scale, matched at each scale's own side, with a patch loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rmd.cascade import Cascade
from rmd.upsampling import upsample
from training.distill.losses import mmd_loss
from training.distill.methods.adversary import TokenTap
from training.distill.methods.base import CleanSamples, DistributionMatching, Matched, Scores
from training.distill.rollout import Prompts, Rollout, State, X0Backbone

if TYPE_CHECKING:
    from training.distill.settings import DistillSettings


class SwD(DistributionMatching):
    """Per-scale distribution matching on data: a step starts from a clean sample of the scale before, upsampled and
    noised, not from a roll-out. The clean samples are the teacher's own."""

    name: ClassVar[str] = "swd"
    defaults: ClassVar[Mapping[str, Any]] = {
        "interval": "full", "loss": "squared", "normalise": True, "fake_weighting": "velocity", "fake_steps": 5,
        "low_stage_iterations": 0, "transition_noise_intensity": 0.0, "mmd_weight": 1.0,
    }  # fmt: skip

    def __init__(
        self, backbone: X0Backbone, cascade: Cascade, settings: DistillSettings, prompts: Prompts, guidance_scale: float
    ) -> None:
        cascade = replace(cascade, step_noise_intensity=0.0, transition_noise_intensity=0.0)
        super().__init__(backbone, cascade, settings, prompts, guidance_scale)
        self.samples: CleanSamples | None = None
        self._drawn: dict[int, Tensor] = {}

    @property
    def needs_samples(self) -> bool:
        """Always: every step starts from one."""
        return True

    def attach(self, fake: nn.Module, samples: CleanSamples | None) -> None:
        """Take the clean samples, and the network whose tokens the patch loss compares."""
        self.samples, self.fake = samples, fake

    def states(self, rollout: Rollout, student: nn.Module, active: Sequence[int]) -> list[State]:
        """Clean samples at the side of the step before, lifted to the step's side and noised to its time."""
        if self.samples is None:
            raise RuntimeError("SwD trains on samples: it needs attach() first")
        random, steps = rollout.random, self.cascade.steps
        index = active[int(random.integers(len(active), 1))]
        at = random.integers(len(self.samples.latents), rollout.batch_size)
        latents, rows = self.samples.latents[at].to(rollout.backbone.device), self.samples.rows[at]
        shape = rollout.backbone.latent_shape(steps[index].size)
        before = rollout.backbone.latent_shape(steps[max(index - 1, 0)].size)
        clean = upsample(upsample(latents, before), shape, self.cascade.x0_upsampling)
        self._drawn = {index: upsample(latents, shape)}
        x_t = rollout.backbone.schedule.add_noise(clean, random.normal(clean.shape), steps[index].t)
        return [State(index, x_t, rows)]

    def generator_loss(self, matched: Matched, scores: Scores) -> tuple[Tensor, dict[str, float]]:
        """The DMD loss, plus `mmd_weight` times the patch loss between student and clean samples, equally noised."""
        loss, figures = super().generator_loss(matched, scores)
        step, sample = int(matched.steps[0]), scores.sample
        if self.settings.mmd_weight and step in self._drawn:
            real = self._drawn[step].to(matched.y)
            offset = sample.x - self._scaled(matched.y.detach(), sample.tau)
            with torch.no_grad():
                real_tokens = self._tokens(self._scaled(real, sample.tau) + offset, matched, sample.tau)
            student_x = self._scaled(matched.y, sample.tau) + offset
            patch = mmd_loss(self._tokens(student_x, matched, sample.tau), real_tokens)
            figures["patch_loss"] = float(patch.detach())
            loss = loss + self.settings.mmd_weight * patch
        return loss, figures

    def _scaled(self, y: Tensor, tau: Tensor) -> Tensor:
        return self.backbone.schedule.add_noise(y, torch.zeros_like(y), tau)

    def _tokens(self, x: Tensor, matched: Matched, tau: Tensor) -> Tensor:
        with TokenTap(self.fake).listening() as tap:
            self.backbone.predict_x0(x, tau, self.prompts.conditioning(matched.rows), matched.size, denoiser=self.fake)
            return tap.take()
