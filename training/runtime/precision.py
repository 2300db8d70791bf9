"""In which dtype training's networks multiply."""

from __future__ import annotations

import torch

from rmd.dtypes import native_dtype


def native_autocast(device: torch.device | str) -> torch.autocast:
    """Autocast to the device's own dtype; does nothing on a CPU that would have to emulate bfloat16."""
    dtype = native_dtype(device)
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
