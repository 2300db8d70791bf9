"""SwD: scale-wise distillation, one step a scale, matched at each scale's own side, with a patch loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from rmd.cascade import Cascade
from rmd.size import Size
from rmd.upsampling import upsample
from training.distill.losses import mmd_loss
from training.distill.methods.adversary import TokenTap
from training.distill.methods.base import DistillationMethod, Matched, ScoreSample
from training.distill.rollout import Prompts, Rollout, State, X0Backbone
from training.distill.settings import DistillSettings


class SwD(DistillationMethod):
    """Per-scale distribution matching on data: a step starts from a clean sample of the scale before, upsampled and
    noised, not from a roll-out. The clean samples are the teacher's own."""

    name: ClassVar[str] = "swd"

    def __init__(
        self, backbone: X0Backbone, cascade: Cascade, settings: DistillSettings, prompts: Prompts, guidance_scale: float
    ) -> None:
        cascade = replace(cascade, step_noise_intensity=0.0, transition_noise_intensity=0.0)
        super().__init__(backbone, cascade, settings, prompts, guidance_scale)
        self.real: tuple[Tensor, Tensor] | None = None
        self.tap: TokenTap | None = None
        self._drawn: dict[int, Tensor] = {}

    def matched_size(self, size: Size) -> Size:
        """The scale's own side."""
        return size

    def attach_adversary(self, fake: nn.Module, token_width: int, real: Tensor, rows: Tensor) -> None:
        """Give the method its clean samples and the network whose tokens the patch loss compares.

        Args:
            fake: the fake score network.
            token_width: unused; the patch loss has no parameters.
            real: (N, C, [T], H, W) samples of the teacher at the full side.
            rows: (N,) their prompts' rows.
        """
        self.real = real, rows
        self.tap = TokenTap(fake)

    def states(self, rollout: Rollout, student: nn.Module, active: Sequence[int]) -> list[State]:
        """Clean samples at the side of the step before, lifted to the step's side and noised to its time."""
        if self.real is None:
            raise RuntimeError("SwD trains on samples: call attach_adversary first")
        random, steps = rollout.random, self.cascade.steps
        index = active[int(random.shared() * len(active))]
        at = random.integers(len(self.real[0]), rollout.batch_size)
        latents, rows = self.real[0][at].to(rollout.backbone.device), self.real[1][at]
        shape = rollout.backbone.latent_shape(steps[index].size)
        before = rollout.backbone.latent_shape(steps[max(index - 1, 0)].size)
        clean = upsample(upsample(latents, before), shape, self.cascade.x0_upsampling)
        self._drawn = {index: upsample(latents, shape)}
        x_t = rollout.backbone.schedule.add_noise(clean, random.normal(clean.shape), steps[index].t)
        return [State(index, x_t, rows)]

    def generator_loss(
        self, matched: Matched, teacher: nn.Module | None, fake: nn.Module | None, sample: ScoreSample
    ) -> tuple[Tensor, dict[str, float]]:
        """The DMD loss, plus `mmd_weight` times the patch loss between student and clean samples, equally noised."""
        loss, figures = super().generator_loss(matched, teacher, fake, sample)
        step = int(matched.steps[0])
        if self.tap is not None and self.settings.mmd_weight and step in self._drawn:
            real = self._drawn[step].to(matched.y)
            offset = sample.x - self._scaled(matched.y.detach(), sample.tau)
            with torch.no_grad():
                real_tokens = self._tokens(self._scaled(real, sample.tau) + offset, matched, fake, sample.tau)
            student_x = self._scaled(matched.y, sample.tau) + offset
            patch = mmd_loss(self._tokens(student_x, matched, fake, sample.tau), real_tokens)
            figures["patch_loss"] = float(patch.detach())
            loss = loss + self.settings.mmd_weight * patch
        return loss, figures

    def _scaled(self, y: Tensor, tau: Tensor) -> Tensor:
        return self.backbone.schedule.add_noise(y, torch.zeros_like(y), tau)

    def _tokens(self, x: Tensor, matched: Matched, fake: nn.Module | None, tau: Tensor) -> Tensor:
        if self.tap is None:
            raise RuntimeError("attach_adversary was not called")
        with self.tap.listening() as tap:
            self.backbone.predict_x0(x, tau, self.prompts.conditioning(matched.rows), matched.size, denoiser=fake)
            return tap.take()
