"""DMD2: distribution matching over the whole time axis, stochastic steps, an optional GAN loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rmd.cascade import Cascade
from training.distill.losses import gan_discriminator_loss, gan_generator_loss
from training.distill.methods.adversary import DiscriminatorHead, TokenTap, token_width
from training.distill.methods.base import CleanSamples, DistributionMatching, Matched, Scores
from training.distill.rollout import Prompts, X0Backbone
from training.runtime.randomness import Randomness

if TYPE_CHECKING:
    from training.distill.settings import DistillSettings


class DMD2(DistributionMatching):
    """Fresh noise between steps, times from the whole axis, five fake-score updates for each of the student's.

    The GAN loss (`gan_weight`) judges noised samples by the fake network's middle tokens; its real side are samples of
    the teacher, so the method stays free of data.
    """

    name: ClassVar[str] = "dmd2"
    one_size: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "interval": "full", "loss": "squared", "normalise": True, "fake_weighting": "velocity", "fake_steps": 5,
        "low_stage_iterations": 0,
    }  # fmt: skip

    def __init__(
        self, backbone: X0Backbone, cascade: Cascade, settings: DistillSettings, prompts: Prompts, guidance_scale: float
    ) -> None:
        super().__init__(backbone, replace(cascade, step_noise_intensity=0.0), settings, prompts, guidance_scale)
        self.head: DiscriminatorHead | None = None
        self.samples: CleanSamples | None = None

    @property
    def needs_samples(self) -> bool:
        """With the GAN loss."""
        return self.settings.gan_weight > 0

    def attach(self, fake: nn.Module, samples: CleanSamples | None) -> None:
        """Set up the discriminator's head, which a checkpoint holds in any case."""
        width = token_width(self.backbone, self.prompts, fake, self.cascade.full_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self.head = DiscriminatorHead(width).to(self.backbone.device)
        self.samples, self.fake = samples, fake

    def critic_parameters(self) -> dict[str, nn.Parameter]:
        """The head's."""
        if self.head is None:
            return {}
        return {f"discriminator.{name}": parameter for name, parameter in self.head.named_parameters()}

    def generator_loss(self, matched: Matched, scores: Scores) -> tuple[Tensor, dict[str, float]]:
        """The DMD loss, plus `gan_weight` times `softplus(-D(noised y))`."""
        loss, figures = super().generator_loss(matched, scores)
        if self.head is not None:
            sample = scores.sample
            # The same noised sample, now with the student's gradient: its value is x, its derivative alpha.
            change = self.backbone.schedule.add_noise(
                matched.y - matched.y.detach(), torch.zeros_like(matched.y), sample.tau
            )
            adversarial = gan_generator_loss(self._logits(sample.x + change, sample.tau, matched.rows, matched))
            figures["gan_generator_loss"] = float(adversarial.detach())
            loss = loss + self.settings.gan_weight * adversarial
        return loss, figures

    def critic_loss(
        self, matched: Matched, fake: nn.Module | None, random: Randomness, shared: Scores | None = None
    ) -> Tensor:
        """The fake score's loss, plus `gan_weight` times the discriminator's."""
        loss = super().critic_loss(matched, fake, random, shared)
        if self.samples is None:
            return loss
        noised = self.score_sample(matched, random)
        at = random.integers(len(self.samples.latents), len(matched.rows))
        real_y, real_rows = self.samples.latents[at].to(matched.y), self.samples.rows[at]
        real = self.backbone.schedule.add_noise(real_y, random.normal(real_y.shape), noised.tau)
        student_logits = self._logits(noised.x, noised.tau, matched.rows, matched)
        real_logits = self._logits(real, noised.tau, real_rows, matched)
        return loss + self.settings.gan_weight * gan_discriminator_loss(real_logits, student_logits)

    def _logits(self, x: Tensor, tau: Tensor, rows: Tensor, matched: Matched) -> Tensor:
        if self.head is None:
            raise RuntimeError("the GAN loss needs attach() first")
        with TokenTap(self.fake).listening() as tap, torch.enable_grad():
            self.backbone.predict_x0(x, tau, self.prompts.conditioning(rows), matched.size, denoiser=self.fake)
            logits: Tensor = self.head(tap.take())
        return logits
