"""Pictures and films to bytes: PNG of our own, JPEG and WebP through Pillow, H.264 in MP4 through PyAV."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from server.front.png import encode_png

OutputFormat = Literal["png", "jpeg", "webp"]
Pixels = npt.NDArray[np.uint8]

_BT709, _LIMITED_RANGE = 1, 1  # FFmpeg's numbers
# Where x264 weighs blocks by what refers to them (mbtree), the same film has other bytes from one time to the next.
_H264 = {"crf": "18", "x264-params": "mbtree=0"}
_SPRITES = 16
_SPRITE_WIDTH = 320

MEDIA_TYPES: Mapping[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


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
    if output_format == "png":
        return encode_png(pixels, metadata or {})
    picture = Image.fromarray(pixels, mode="RGB")
    buffer = io.BytesIO()
    if output_format == "jpeg":
        picture.save(buffer, format="JPEG", quality=_quality(compression), subsampling=0)
    else:
        picture.save(buffer, format="WEBP", quality=_quality(compression), method=4)
    return buffer.getvalue()


def encode_film(pixels: Pixels, frames_per_second: int) -> bytes:
    """Compress one film, near lossless, its index in front so that it plays while it loads.

    The same film has the same bytes, so that a job that is made again is seen to be.

    Args:
        pixels: (T, H, W, 3) uint8; height and width must be even.
        frames_per_second: of the file.

    Returns:
        The MP4 file's bytes.

    Raises:
        MemoryError, OSError: the machine has too little memory, too few descriptors or no room for a temporary file.
    """
    import av

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"  # moving the index to the front needs a file with a name
        try:
            with av.open(str(path), mode="w", format="mp4", options={"movflags": "faststart"}) as container:
                stream = container.add_stream("libx264", rate=Fraction(frames_per_second), options=_H264)
                stream.height, stream.width = pixels.shape[1:3]
                stream.pix_fmt = "yuv420p"
                # Said in the file: players guess by the height otherwise, and would shift the colours of large films.
                context = stream.codec_context
                context.colorspace = context.color_primaries = context.color_trc = _BT709
                context.color_range = _LIMITED_RANGE
                for frame in pixels:
                    picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                    picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                    container.mux(stream.encode(picture))
                container.mux(stream.encode(None))
        except av.error.ExternalError as error:
            # x264 says no more than that; to what it is given here it objects for no other reason
            raise MemoryError("x264 found no memory") from error
        return path.read_bytes()


def encode_thumbnail(pixels: Pixels) -> bytes:
    """Return a film's (T, H, W, 3) middle frame as WebP."""
    return encode_picture(pixels[len(pixels) // 2], "webp", 85)


def encode_spritesheet(pixels: Pixels) -> bytes:
    """Return up to 16 frames of a film (T, H, W, 3), evenly spaced, row by row in one JPEG; at most 320 wide each."""
    chosen = np.linspace(0, len(pixels) - 1, min(len(pixels), _SPRITES)).round().astype(int)
    frames = [Image.fromarray(pixels[i]) for i in chosen]
    for frame in frames:
        frame.thumbnail((_SPRITE_WIDTH, 10 * _SPRITE_WIDTH))
    columns = math.ceil(math.sqrt(len(frames)))
    width, height = frames[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(frames) / columns) * height))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % columns * width, number // columns * height))
    return encode_picture(np.asarray(sheet), "jpeg", 85)


def _quality(compression: int | None) -> int:
    return 95 if compression is None else max(1, compression)
