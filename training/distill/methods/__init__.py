"""The distillation methods by name."""

from __future__ import annotations

from training.distill.methods.base import DistributionMatching
from training.distill.methods.dmd2 import DMD2
from training.distill.methods.naive import Naive
from training.distill.methods.rmd import RMD
from training.distill.methods.swd import SwD
from training.distill.methods.tdm import TDM

METHODS: dict[str, type[DistributionMatching]] = {"rmd": RMD, "tdm": TDM, "dmd2": DMD2, "swd": SwD, "naive": Naive}

__all__ = ["DMD2", "METHODS", "RMD", "TDM", "DistributionMatching", "Naive", "SwD"]
