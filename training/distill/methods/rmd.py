"""RMD: every stage is matched at the teacher's full side, through the upsampling transformation (Algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

from rmd.size import Size
from training.distill.methods.base import DistillationMethod


class RMD(DistillationMethod):
    """Cross-resolution distribution matching. Low stages reach the teacher's grid by U, with gradient."""

    name: ClassVar[str] = "rmd"

    def matched_size(self, size: Size) -> Size:
        """The teacher's full side, whatever the stage's own."""
        return Size.parse(self.settings.match_at) if self.settings.match_at else self.cascade.full_size
