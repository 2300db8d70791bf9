"""The processes of a run, one a device, as `accelerate launch` or torchrun started them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from rmd.backbones.base import usable_device

_LONGEST_WAIT = timedelta(hours=6)
"""The first process encodes the prompts, draws sheets and writes checkpoints while the others wait."""


class LostProcessError(ConnectionError):
    """Another process of the run has ended; the message says what to do."""


def processes(device: str, tracker: str = "none", run: Path | None = None) -> Accelerator:
    """Join the run's other processes; each gets a device of its own.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        tracker: "none", "tensorboard" or "wandb" (see :func:`start_tracker`).
        run: the folder that a tracker writes to.

    Raises:
        ValueError: one numbered device for several processes, or a tracker that is not installed.
        BackboneError: an unknown device, or one that this torch cannot use.
    """
    if device != "auto":
        usable_device(device)
    if device.startswith("cuda:") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"--device {device}: every process would take that one; leave it out or give --device cuda")
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"tracker={tracker} needs the package {tracker}: install it, or leave tracker out")
    return Accelerator(
        cpu=device == "cpu",
        log_with=None if tracker == "none" else tracker,
        project_dir=run,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
    )


def start_tracker(accelerator: Accelerator, run: Path, record: Mapping[str, Any]) -> None:
    """Begin the tracker's record of a run, with its settings. W&B stays offline: `wandb sync` uploads by hand."""
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in record.items()}
    accelerator.init_trackers(run.name, plain, {"wandb": {"mode": "offline", "dir": str(run)}})


@contextmanager
def lost_processes(advice: str) -> Iterator[None]:
    """Say in one line that another process has ended, where a collective fails for it.

    Raises:
        LostProcessError: in place of the collective's own error.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "NCCL"))
        if not (torch.distributed.is_initialized() and lost):
            raise
        raise LostProcessError(f"another process of this run has ended (its own message says why); {advice}") from error
