"""The naive cascade, distilled: each stage is matched at its own side, and nothing ties one side to the next.

The paper's own baseline for cross-resolution matching (Table 3's UP without RM, the "naive 2-stage baseline" beside
Table 5): the same steps and the same hand-over between sides, each stage an ordinary distillation at its side.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rmd.cascade import INTERVAL_CLIP
from rmd.timesteps import map_timestep
from training.distill.methods.base import DistributionMatching


class Naive(DistributionMatching):
    """Without U between student and teacher. Times, loss and weights are RMD's.

    A stage's interval lies at the noise of its own side: its ends are mapped (Eq. 2) as the stage's steps are.
    """

    name: ClassVar[str] = "naive"

    def _intervals(self) -> Tensor:
        cascade, (lowest, highest) = self.cascade, INTERVAL_CLIP
        intervals = super()._intervals()
        for row, step in zip(intervals, cascade.steps, strict=True):
            scale = cascade.full_size.short_side / step.size.short_side
            for index, time in enumerate(row.tolist()):
                mapped = map_timestep(1000 * time, scale, cascade.resolution_map, self.backbone.schedule) / 1000
                row[index] = min(max(mapped, lowest), highest)
        return intervals
