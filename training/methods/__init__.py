"""The distillation methods by name."""

from __future__ import annotations

from training.methods.base import DistillationMethod
from training.methods.dmd2 import DMD2
from training.methods.rmd import RMD
from training.methods.swd import SwD
from training.methods.tdm import TDM

METHODS: dict[str, type[DistillationMethod]] = {"rmd": RMD, "tdm": TDM, "dmd2": DMD2, "swd": SwD}

__all__ = ["DMD2", "METHODS", "RMD", "TDM", "DistillationMethod", "SwD"]
