"""TDM: distribution matching along the trajectory, at one resolution (arXiv 2503.06674, Luo-Yihong/TDM 81b019f)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from training.distill.intervals import faded_intensity
from training.distill.losses import MAX_SNR_WEIGHT, uncapped_snr
from training.distill.methods.base import DistributionMatching, Matched, ScoreSample

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

    def score_intensity(self, matched: Matched, tau: Tensor) -> Tensor:
        """The share that is left at `tau` of the predicted noise, which is all there is at the step's end."""
        times = [step.teacher_timestep / 1000 for step in self.cascade.steps[1:]] + [0.0]
        ends = torch.tensor(times, dtype=torch.float64)[matched.steps].to(tau.device)
        return faded_intensity(self.backbone.schedule, torch.ones_like(tau), ends, tau)

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
