"""Files from decoded tensors: PNG, contact sheets, MP4. Written to a temporary name first, then moved."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from server.front.media import encode_film

CAPTION_HEIGHT = 16
_CHARACTER_WIDTH = 6


def write_png(picture: Image.Image, path: Path) -> None:
    """Writes one PNG."""
    _replace(path, lambda temporary: picture.save(temporary, format="PNG"))


def write_mp4(frames: Sequence[Image.Image], path: Path, frames_per_second: int) -> None:
    """Writes one film as H.264 in MP4. Height and width must be even."""
    content = encode_film(np.stack([np.asarray(frame) for frame in frames]), frames_per_second)
    _replace(path, lambda temporary: temporary.write_bytes(content))


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], captions: Sequence[str], headings: Sequence[str]
) -> Image.Image:
    """One picture of all: a row a prompt with its caption above it, a column a schedule with its heading."""
    width, height = rows[0][0].size
    gap = 4
    columns = len(headings)
    sheet = Image.new(
        "RGB",
        (columns * (width + gap) + gap, CAPTION_HEIGHT + len(rows) * (height + CAPTION_HEIGHT + gap) + gap),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        draw.text((gap + column * (width + gap), 2), _cut(heading, width), fill="black")
    for number, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = CAPTION_HEIGHT + number * (height + CAPTION_HEIGHT + gap)
        draw.text((gap, top), _cut(caption, columns * (width + gap)), fill="black")
        for column, picture in enumerate(row):
            sheet.paste(picture, (gap + column * (width + gap), top + CAPTION_HEIGHT))
    return sheet


def _cut(text: str, width: int) -> str:
    # Pillow's built-in bitmap font knows Latin-1 only.
    plain = text.encode("latin-1", "replace").decode("latin-1")
    room = max(width // _CHARACTER_WIDTH, 4)
    return plain if len(plain) <= room else plain[: room - 1] + "."


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
