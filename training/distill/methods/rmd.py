"""RMD: every stage is matched at the teacher's full side, through the upsampling transformation (Algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rmd.size import Size
from training.distill.intervals import faded_intensity, step_ends
from training.distill.methods.base import DistributionMatching, Matched


class RMD(DistributionMatching):
    """Cross-resolution distribution matching. Low stages reach the teacher's grid by U, with gradient.

    Times come from the stages' disjoint intervals; the loss is Eq. 8's, the fake score's Eq. 9's: the general defaults.
    """

    name: ClassVar[str] = "rmd"

    def matched_size(self, size: Size) -> Size:
        """The teacher's full side, whatever the stage's own."""
        return Size.parse(self.settings.match_at) if self.settings.match_at else self.cascade.full_size

    def score_intensity(self, matched: Matched, tau: Tensor) -> Tensor:
        """`a` of Eq. 10: the cascade's where a stage lies below the matched side, else 0 unless asked for.

        Under `score_noise=trajectory` it is what the sample has at its step's end, and fades from there.
        """
        steps, everywhere = self.cascade.steps, self.settings.score_noise_everywhere
        a = self.cascade.score_noise_intensity
        per_step = [a if everywhere or step.size != self.matched_size(step.size) else 0.0 for step in steps]
        intensity = torch.tensor(per_step, dtype=torch.float64)[matched.steps]
        if self.settings.score_noise == "constant":
            return intensity
        ends = step_ends(self.cascade)[matched.steps]
        return faded_intensity(self.backbone.schedule, intensity, ends, tau.cpu())
