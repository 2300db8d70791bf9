"""DMD2: distribution matching over the whole time axis, stochastic steps, an optional GAN loss."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from rmd.cascade import Cascade
from training.distill.losses import gan_discriminator_loss, gan_generator_loss
from training.distill.methods.adversary import DiscriminatorHead, TokenTap
from training.distill.methods.base import Matched, ScoreSample
from training.distill.methods.tdm import TDM
from training.distill.rollout import Prompts, X0Backbone
from training.distill.settings import DistillSettings
from training.runtime.randomness import Randomness


class DMD2(TDM):
    """Fresh noise between steps, times from the whole axis, five fake-score updates for each of the student's.

    The GAN loss (`gan_weight`) judges noised samples by the fake network's middle tokens; its real side are samples of
    the teacher, so the method stays free of data.
    """

    name: ClassVar[str] = "dmd2"

    def __init__(
        self, backbone: X0Backbone, cascade: Cascade, settings: DistillSettings, prompts: Prompts, guidance_scale: float
    ) -> None:
        super().__init__(backbone, replace(cascade, step_noise_intensity=0.0), settings, prompts, guidance_scale)
        self.head: DiscriminatorHead | None = None
        self.real: tuple[Tensor, Tensor] | None = None

    def attach_adversary(self, fake: nn.Module, token_width: int, real: Tensor, rows: Tensor) -> DiscriminatorHead:
        """Set up the GAN loss.

        Args:
            fake: the fake score network.
            token_width: of its middle block's tokens.
            real: (N, C, [T], H, W) samples of the teacher at the full side.
            rows: (N,) their prompts' rows.

        Returns:
            the head, whose parameters belong to the fake score's optimiser.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self.head = DiscriminatorHead(token_width).to(self.backbone.device)
        self.real = real, rows
        self.tap = TokenTap(fake)
        return self.head

    def generator_loss(
        self, matched: Matched, teacher: nn.Module | None, fake: nn.Module | None, sample: ScoreSample
    ) -> tuple[Tensor, dict[str, float]]:
        """The DMD loss, plus `gan_weight` times `softplus(-D(noised y))`."""
        loss, figures = super().generator_loss(matched, teacher, fake, sample)
        if self.head is not None:
            # The same noised sample, now with the student's gradient: its value is x, its derivative alpha.
            change = self.backbone.schedule.add_noise(
                matched.y - matched.y.detach(), torch.zeros_like(matched.y), sample.tau
            )
            logits = self._logits(sample.x + change, sample.tau, matched.rows, matched, fake)
            adversarial = gan_generator_loss(logits)
            figures["gan_generator_loss"] = float(adversarial.detach())
            loss = loss + self.settings.gan_weight * adversarial
        return loss, figures

    def critic_loss(
        self, matched: Matched, fake: nn.Module | None, random: Randomness, sample: ScoreSample | None = None
    ) -> Tensor:
        """The fake score's loss, plus `gan_weight` times the discriminator's."""
        loss = super().critic_loss(matched, fake, random, sample)
        if self.head is None or self.real is None:
            return loss
        latents, all_rows = self.real
        noised = self.score_sample(matched, random)
        at = random.integers(len(latents), len(matched.rows))
        real_y, real_rows = latents[at].to(matched.y), all_rows[at]
        real = self.backbone.schedule.add_noise(real_y, random.normal(real_y.shape), noised.tau)
        student_logits = self._logits(noised.x, noised.tau, matched.rows, matched, fake)
        real_logits = self._logits(real, noised.tau, real_rows, matched, fake)
        return loss + self.settings.gan_weight * gan_discriminator_loss(real_logits, student_logits)

    def _logits(self, x: Tensor, tau: Tensor, rows: Tensor, matched: Matched, fake: nn.Module | None) -> Tensor:
        if self.head is None:
            raise RuntimeError("attach_adversary was not called")
        with self.tap.listening() as tap, torch.enable_grad():
            self.backbone.predict_x0(x, tau, self.prompts.conditioning(rows), matched.size, denoiser=fake)
            logits: Tensor = self.head(tap.take())
        return logits
