"""What an engine of the tiny checkpoint imports, for a process that engines are forked from."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import server.device.engine
import server.device.loading  # noqa: F401
import tests.server.sick_engine  # noqa: F401
from rmd.backbones.registry import load_checkpoint
from rmd.backbones.tiny import write_tiny_folder

torch.set_num_threads(1)  # no threads, which a fork would leave behind
with tempfile.TemporaryDirectory() as folder:
    load_checkpoint(write_tiny_folder("sd3", Path(folder) / "tiny"), dtype=torch.float32)
