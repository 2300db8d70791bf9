"""RMD: every stage is matched at the teacher's full side, through the upsampling transformation (Algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rmd.size import Size
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
        """`a` of Eq. 10: the cascade's where a stage lies below the full side, else 0 unless asked for."""
        a, everywhere = self.cascade.score_noise_intensity, self.settings.score_noise_everywhere
        per_step = [a if everywhere or step.size != self.cascade.full_size else 0.0 for step in self.cascade.steps]
        return torch.tensor(per_step, dtype=torch.float64)[matched.steps]
