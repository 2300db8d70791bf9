"""The processes of a run, one a device, as `accelerate launch` or torchrun started them."""

from __future__ import annotations

import os
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from rmd.backbones.base import usable_device

_LONGEST_WAIT = timedelta(hours=6)
"""The first process encodes the prompts, draws sheets and writes checkpoints while the others wait."""


def processes(device: str) -> Accelerator:
    """Join the run's other processes; each gets a device of its own.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: one numbered device for several processes.
        BackboneError: an unknown device, or one that this torch cannot use.
    """
    if device != "auto":
        usable_device(device)
    if device.startswith("cuda:") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"--device {device}: every process would take that one; leave it out or give --device cuda")
    return Accelerator(cpu=device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)])
