"""TDM: distribution matching along the trajectory, at one resolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from training.distill.methods.base import DistributionMatching


class TDM(DistributionMatching):
    """Each step is matched on its own interval `[t_k+1, t_k]`, with deterministic steps between."""

    name: ClassVar[str] = "tdm"
    one_size: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "interval": "step", "loss": "elementwise_huber", "normalise": True, "fake_weighting": "snr",
        "low_stage_iterations": 0,
    }  # fmt: skip
