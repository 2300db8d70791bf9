"""Pictures to bytes: PNG, JPEG and WebP through Pillow."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

OutputFormat = Literal["png", "jpeg", "webp"]
Pixels = npt.NDArray[np.uint8]

MEDIA_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def to_pixels(decoded: Tensor) -> list[Pixels]:
    """Turn decoded pictures (B, 3, H, W), floats in [0, 1], into B arrays (H, W, 3) of uint8, rounded."""
    levels = decoded.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return list(levels.permute(0, 2, 3, 1).contiguous().cpu().numpy())


def encode_picture(
    pixels: Pixels,
    output_format: OutputFormat = "png",
    compression: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Compress one picture.

    Args:
        pixels: (H, W, 3) uint8.
        output_format: the container.
        compression: quality 0..100 of JPEG and WebP; None means 95. PNG is lossless and ignores it.
        metadata: short texts written into a PNG's tEXt chunks. The prompt is never among them: a picture is
            often passed on by people who did not mean to pass on what they typed.

    Returns:
        The file's bytes.
    """
    picture = Image.fromarray(pixels, mode="RGB")
    buffer = io.BytesIO()
    if output_format == "png":
        info = PngImagePlugin.PngInfo()
        for key, value in (metadata or {}).items():
            info.add_text(key, value)
        picture.save(buffer, format="PNG", pnginfo=info, compress_level=4)
    elif output_format == "jpeg":
        picture.save(buffer, format="JPEG", quality=_quality(compression), subsampling=0)
    else:
        picture.save(buffer, format="WEBP", quality=_quality(compression), method=4)
    return buffer.getvalue()


def _quality(compression: int | None) -> int:
    return 95 if compression is None else max(1, compression)
