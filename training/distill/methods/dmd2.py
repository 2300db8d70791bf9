"""DMD2: distribution matching over the whole time axis with a GAN loss (arXiv 2405.14867, tianweiy/DMD2 8d8fa55)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rmd.cascade import Cascade
from training.distill.losses import gan_discriminator_loss, gan_generator_loss
from training.distill.methods.base import CleanSamples, DistributionMatching, Matched, Scores
from training.distill.methods.discriminators import ConvolutionalHead, seeded
from training.distill.methods.tokens import TokenTap, middle_map
from training.distill.rollout import Prompts, X0Backbone
from training.runtime.randomness import Randomness

if TYPE_CHECKING:
    from training.distill.settings import DistillSettings

_FIRST, _LAST = 0.001, 0.999
"""The ends of the times of the fake score's loss; at 0 and 1 flow models have an infinite and an empty weight."""


class DMD2(DistributionMatching):
    """Fresh noise between steps, times from the whole axis, five fake-score updates for each of the student's.

    The student's loss draws `tau` from [.02, .98], the fake score's, of the noise, from the whole axis. A head on the
    fake network's bottleneck tells noised samples of the student from noised clean ones, each at a time of its own.
    """

    name: ClassVar[str] = "dmd2"
    one_size: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "interval": "full", "loss": "squared", "normalise": True, "fake_weighting": "uncapped_snr", "fake_steps": 5,
        "gan_weight": 5e-3, "gan_critic_weight": 1e-2, "low_stage_iterations": 0, "rollout": "fresh",
        "betas": (0.9, 0.999), "weight_decay": 1e-2, "clip_norm": 10.0,
    }  # fmt: skip

    def __init__(
        self, backbone: X0Backbone, cascade: Cascade, settings: DistillSettings, prompts: Prompts, guidance_scale: float
    ) -> None:
        super().__init__(backbone, replace(cascade, step_noise_intensity=0.0), settings, prompts, guidance_scale)
        self.head: nn.Module | None = None
        self.samples: CleanSamples | None = None

    @property
    def needs_samples(self) -> bool:
        """With the GAN loss."""
        return self.settings.gan_weight > 0

    def attach(self, fake: nn.Module, samples: CleanSamples | None) -> None:
        """Set up the discriminator's head, which a checkpoint holds in any case."""
        features = middle_map(self.backbone, self.prompts, fake, self.cascade.full_size)
        self.head = seeded(lambda: ConvolutionalHead(*features.shape[1:]), self.settings.seed).to(self.backbone.device)
        self.samples, self.fake = samples, fake

    def critic_parameters(self) -> dict[str, nn.Parameter]:
        """The head's."""
        if self.head is None:
            return {}
        return {f"discriminator.{name}": parameter for name, parameter in self.head.named_parameters()}

    def critic_times(self, matched: Matched, random: Randomness) -> Tensor:
        """The whole axis, for every step."""
        return _FIRST + (_LAST - _FIRST) * random.uniform(len(matched.steps))

    def generator_loss(self, matched: Matched, scores: Scores, random: Randomness) -> tuple[Tensor, dict[str, float]]:
        """The DMD loss, plus `gan_weight` times `softplus(-D(noised y))`."""
        loss, figures = super().generator_loss(matched, scores, random)
        if self.head is not None:
            adversarial = gan_generator_loss(self._logits(matched.y, matched.rows, matched, random))
            figures["gan_generator_loss"] = float(adversarial.detach())
            loss = loss + self.settings.gan_weight * adversarial
        return loss, figures

    def critic_loss(
        self, matched: Matched, fake: nn.Module | None, random: Randomness, shared: Scores | None = None
    ) -> Tensor:
        """The fake score's loss, plus `gan_critic_weight` times the discriminator's."""
        loss = super().critic_loss(matched, fake, random, shared)
        if self.samples is None:
            return loss
        latents = self.samples.latents[matched.size]
        at = random.integers(len(latents), len(matched.rows))
        real_logits = self._logits(latents[at].to(matched.y), self.samples.rows[at], matched, random)
        student_logits = self._logits(matched.y.detach(), matched.rows, matched, random)
        return loss + self.settings.gan_critic_weight * gan_discriminator_loss(real_logits, student_logits)

    def _logits(self, clean: Tensor, rows: Tensor, matched: Matched, random: Randomness) -> Tensor:
        """The discriminator's opinion of clean latents, noised to times from the whole axis."""
        if self.head is None:
            raise RuntimeError("the GAN loss needs attach() first")
        tau = random.uniform(len(rows))
        x = self.backbone.schedule.add_noise(clean, random.normal(clean.shape), tau)
        with TokenTap(self.fake).listening() as tap, torch.enable_grad():
            self.backbone.predict_x0(x, tau, self.prompts.conditioning(rows), matched.size, denoiser=self.fake)
            logits: Tensor = self.head(tap.take_map(x))
        return logits

    def _check(self) -> None:
        super()._check()
        if self.needs_samples and self.cascade.full_size.num_frames > 1:
            raise ValueError("gan_weight: DMD2's head judges single pictures; for films set it to 0")
