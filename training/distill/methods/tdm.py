"""TDM: distribution matching along the trajectory, at one resolution."""

from __future__ import annotations

from typing import ClassVar

from rmd.size import Size
from training.distill.methods.base import DistillationMethod


class TDM(DistillationMethod):
    """Each step is matched on its own interval `[t_k+1, t_k]`, with deterministic steps between.

    The defaults that make it TDM (per-step intervals, elementwise Huber, min-SNR, importance weight) are settings.
    """

    name: ClassVar[str] = "tdm"

    def matched_size(self, size: Size) -> Size:
        """The one side that there is."""
        return size

    def _check(self) -> None:
        super()._check()
        if len(self.cascade.sizes) > 1:
            raise ValueError(
                f"{self.name} works at one resolution; the cascade {self.cascade.schedule_name} has "
                f"{len(self.cascade.sizes)}: give a schedule such as 0+4"
            )
