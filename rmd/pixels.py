"""From the decoder's floats to pixels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pixels = npt.NDArray[np.uint8]


def to_pixels(decoded: Tensor) -> list[Pixels]:
    """Turn decoded pictures or films (B, 3, [T], H, W), floats in [0, 1], into B arrays ([T], H, W, 3) of uint8."""
    levels = decoded.float().mul(255).round_().clamp_(0, 255).to(torch.uint8)
    return list(levels.movedim(1, -1).contiguous().cpu().numpy())
