"""TDM: distribution matching along the trajectory, at one resolution (arXiv 2503.06674, Luo-Yihong/TDM 81b019f)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rmd.noise_schedule import NoiseSchedule
from training.distill.losses import MAX_SNR_WEIGHT, uncapped_snr
from training.distill.methods.base import DistributionMatching, Matched, ScoreSample
from training.distill.rollout import Rollout, State

_MARGIN = 0.01
"""`tau` stays so far below a step's own time (`t_k - 10` of 1000)."""


class TDM(DistributionMatching):
    """Each step is matched along its own piece `[t_k+1, t_k]` of the trajectory.

    The scored sample goes deterministically to the piece's end `t_k+1`, with the student's own predicted noise, and
    from there by the forward process up to `tau`. The fake score learns before the student, each sample at a step of
    its own, with `min(SNR, 5)` and an importance weight.
    """

    name: ClassVar[str] = "tdm"
    one_size: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "interval": "step", "loss": "elementwise_huber", "normalise": True, "fake_weighting": "snr",
        "low_stage_iterations": 0, "fake_first": True, "clip_fake": False, "weight_decay": 1e-2,
    }  # fmt: skip

    def states(self, rollout: Rollout, student: nn.Module, active: Sequence[int]) -> list[State]:
        """Every sample stands at a step of its own."""
        if rollout.pipelined:
            return super().states(rollout, student, active)
        drawn = rollout.random.integers(len(active), rollout.batch_size)
        counts = torch.bincount(drawn, minlength=len(active)).tolist()
        return [rollout.roll_out(student, step, count) for step, count in zip(active, counts, strict=True) if count]

    def score_intensity(self, matched: Matched, tau: Tensor) -> Tensor:
        """The share of predicted noise that is left at `tau`; see :func:`trajectory_intensity`."""
        times = [step.teacher_timestep / 1000 for step in self.cascade.steps[1:]] + [0.0]
        ends = torch.tensor(times, dtype=torch.float64)[matched.steps].to(tau.device)
        return trajectory_intensity(self.backbone.schedule, ends, tau)

    def fake_weights(self, matched: Matched, sample: ScoreSample) -> Tensor:
        """`min(SNR, 5)` times the importance weight `exp(-mean eps_mix^2 / 2) / exp(-mean z^2 / 2)`.

        `eps_mix` is the noise that is in the sample, `z` the fresh part of it.
        """
        if self.settings.fake_weighting != "snr":
            return super().fake_weights(matched, sample)
        mixed, fresh = (noise.square().flatten(1).mean(1) for noise in (sample.noise, sample.fresh))
        snr = uncapped_snr(self.backbone.schedule, sample.tau).clamp(max=MAX_SNR_WEIGHT)
        return snr * torch.exp(0.5 * (fresh - mixed))

    def _intervals(self) -> Tensor:
        intervals = super()._intervals()
        if self.settings.interval == "step":
            own = torch.tensor([step.teacher_timestep / 1000 for step in self.cascade.steps], dtype=torch.float64)
            intervals[:, 1] = torch.minimum(intervals[:, 1], own - _MARGIN)
        return intervals


def trajectory_intensity(schedule: NoiseSchedule, end: Tensor, tau: Tensor) -> Tensor:
    """How much of the noise at `tau` is the predicted one, of a sample that held nothing else at `end`.

    From `alpha_end y + sigma_end eps` the forward process leads to `alpha_tau y + sigma_tau (a eps + sqrt(1 - a^2) z)`
    with `a = (alpha_tau sigma_end) / (alpha_end sigma_tau)`.

    Args:
        end, tau: (B,) times, `tau` above `end`.

    Returns:
        (B,) float64 in [0, 1].
    """
    ratio = schedule.sigma(end) / schedule.alpha(end) * schedule.alpha(tau) / schedule.sigma(tau)
    return ratio.to(torch.float64).clamp(0.0, 1.0)
