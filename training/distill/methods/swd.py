"""SwD: scale-wise distillation on clean pictures, one step a scale (arXiv 2503.16397, yandex-research/swd 9c51e19)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rmd.cascade import Cascade
from rmd.size import Size
from rmd.timesteps import euler_timesteps
from rmd.upsampling import upsample
from training.distill.losses import fake_score_loss, gan_discriminator_loss, gan_generator_loss, mmd_loss
from training.distill.methods.base import CleanSamples, DistributionMatching, Matched, Scores
from training.distill.methods.discriminators import TokenHead, seeded
from training.distill.methods.tokens import TokenTap, middle_map
from training.distill.rollout import Prompts, Rollout, State, X0Backbone
from training.runtime.randomness import Randomness

if TYPE_CHECKING:
    from training.distill.settings import DistillSettings

_TABLE = 28
"""Entries of the teacher's grid that all times are drawn from (main.py:165)."""


class SwD(DistributionMatching):
    """Each scale is matched at its own side: DMD loss, GAN loss, and a patch loss (MMD) on the fake network's tokens.

    A step does not start from a roll-out but from a clean picture at the scale before, enlarged and noised. Clean
    latents of every scale are encoded from pixels that were reduced to it. Times are entries of the teacher's own
    28-step grid, noise first: the scores' from `score_entries`, the patch loss's from `patch_entries`, the fake score's
    from all.
    """

    name: ClassVar[str] = "swd"
    defaults: ClassVar[Mapping[str, Any]] = {
        "loss": "squared", "normalise": True, "fake_weighting": "none", "fake_steps": 5, "fake_first": True,
        "gan_weight": 5e-3, "gan_critic_weight": 1e-2, "mmd_weight": 1.0, "low_stage_iterations": 0, "rollout": "fresh",
        "transition_noise_intensity": 0.0, "betas": (0.9, 0.999), "weight_decay": 1e-2, "clip_norm": 10.0,
    }  # fmt: skip

    def __init__(
        self, backbone: X0Backbone, cascade: Cascade, settings: DistillSettings, prompts: Prompts, guidance_scale: float
    ) -> None:
        cascade = replace(cascade, step_noise_intensity=0.0, transition_noise_intensity=0.0)
        super().__init__(backbone, cascade, settings, prompts, guidance_scale)
        self.table = torch.tensor(euler_timesteps(_TABLE, cascade.flow_shift), dtype=torch.float64) / 1000
        self.head: nn.Module | None = None
        self.samples: CleanSamples | None = None

    @property
    def needs_samples(self) -> bool:
        """Always: every step starts from one."""
        return True

    @property
    def sample_sizes(self) -> tuple[Size, ...]:
        """Every scale."""
        return self.cascade.sizes

    def attach(self, fake: nn.Module, samples: CleanSamples | None) -> None:
        """Take the clean samples and the network whose tokens are compared; set up the discriminator's head."""
        self.samples, self.fake = samples, fake
        if self.settings.gan_weight:
            width = middle_map(self.backbone, self.prompts, fake, self.cascade.full_size).shape[1]
            self.head = seeded(lambda: TokenHead(width), self.settings.seed).to(self.backbone.device)

    def critic_parameters(self) -> dict[str, nn.Parameter]:
        """The head's."""
        if self.head is None:
            return {}
        return {f"discriminator.{name}": parameter for name, parameter in self.head.named_parameters()}

    def states(self, rollout: Rollout, student: nn.Module, active: Sequence[int]) -> list[State]:
        """Clean samples at the side of the step before, lifted to the step's side and noised to its time."""
        if self.samples is None:
            raise RuntimeError("SwD trains on samples: it needs attach() first")
        random, steps, latents = rollout.random, self.cascade.steps, self.samples.latents
        index = active[int(random.shared() * len(active))]
        at = random.integers(len(self.samples.rows), rollout.batch_size)
        size, before = steps[index].size, steps[max(index - 1, 0)].size
        device = rollout.backbone.device
        lower = latents[before][at].to(device)
        start = upsample(lower, rollout.backbone.latent_shape(size), self.cascade.x0_upsampling)
        x_t = rollout.backbone.schedule.add_noise(start, random.normal(start.shape), steps[index].t)
        return [State(index, x_t, self.samples.rows[at], latents[size][at].to(device))]

    def draw_times(self, matched: Matched, random: Randomness) -> Tensor:
        """From the scores' entries of the table."""
        return self._entries(self.settings.score_entries, matched, random)

    def critic_times(self, matched: Matched, random: Randomness) -> Tensor:
        """From all entries."""
        return self._entries((0, _TABLE), matched, random)

    def generator_loss(self, matched: Matched, scores: Scores, random: Randomness) -> tuple[Tensor, dict[str, float]]:
        """The DMD loss, plus `gan_weight` times the GAN loss of the same noised sample, plus `mmd_weight` times the
        patch loss between student and clean samples, equally noised."""
        loss, figures = super().generator_loss(matched, scores, random)
        if self.head is not None:
            logits = self.head(self._tokens(matched.y, scores.sample.noise, scores.sample.tau, matched))
            adversarial = gan_generator_loss(logits)
            figures["gan_generator_loss"] = float(adversarial.detach())
            loss = loss + self.settings.gan_weight * adversarial
        if self.settings.mmd_weight:
            tau = self._entries(self.settings.patch_entries, matched, random)
            noise = random.normal(matched.y.shape)
            with torch.no_grad():
                real = self._tokens(_clean(matched), noise, tau, matched)
            patch = mmd_loss(self._tokens(matched.y, noise, tau, matched), real)
            figures["patch_loss"] = float(patch.detach())
            loss = loss + self.settings.mmd_weight * patch
        return loss, figures

    def critic_loss(
        self, matched: Matched, fake: nn.Module | None, random: Randomness, shared: Scores | None = None
    ) -> Tensor:
        """The fake score's loss, plus `gan_critic_weight` times the discriminator's at the same times and noise."""
        if self.head is None:
            return super().critic_loss(matched, fake, random, shared)
        sample = self.score_sample(matched, random, critic=True)
        conditioning = self.prompts.conditioning(matched.rows)
        with TokenTap(self.fake).listening() as tap:
            predicted = self.backbone.predict_x0(sample.x, sample.tau, conditioning, matched.size, denoiser=fake)
            student_logits = self.head(tap.take())
        real_logits = self.head(self._tokens(_clean(matched), sample.noise, sample.tau, matched))
        loss = fake_score_loss(predicted, sample.y, self.fake_weights(matched, sample))
        return loss + self.settings.gan_critic_weight * gan_discriminator_loss(real_logits, student_logits)

    def _check(self) -> None:
        super()._check()
        for name in ("score_entries", "patch_entries"):
            first, end = getattr(self.settings, name)
            if not 0 <= first < end <= _TABLE:
                raise ValueError(f"{name}=[{first}, {end}]: give a first entry and an end within 0 and {_TABLE}")

    def _tokens(self, clean: Tensor, noise: Tensor, tau: Tensor, matched: Matched) -> Tensor:
        """(B, N, D), the fake network's tokens of clean latents at `tau`."""
        x = self.backbone.schedule.add_noise(clean, noise, tau)
        with TokenTap(self.fake).listening() as tap:
            self.backbone.predict_x0(x, tau, self.prompts.conditioning(matched.rows), matched.size, denoiser=self.fake)
            return tap.take()

    def _entries(self, entries: tuple[int, int], matched: Matched, random: Randomness) -> Tensor:
        first, end = entries
        index = first + random.integers(end - first, len(matched.steps))
        return self.table[index].to(matched.y.device)


def _clean(matched: Matched) -> Tensor:
    if matched.clean is None:
        raise RuntimeError("SwD compares with clean samples, and this prediction was made of none")
    return matched.clean.to(matched.y)
