"""The size of a picture or film, in pixels and frames."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PATTERN = re.compile(r"(\d+)x(\d+)(?:x(\d+))?")


@dataclass(frozen=True, order=True)
class Size:
    """Width and height in pixels, and the number of frames (1 for a picture).

    Raises:
        ValueError: a side or the number of frames is below 1.
    """

    width: int
    height: int
    num_frames: int = 1

    def __post_init__(self) -> None:
        if min(self.width, self.height, self.num_frames) < 1:
            raise ValueError(f"size {self.width}x{self.height}x{self.num_frames}: every number must be at least 1")

    def __str__(self) -> str:
        text = f"{self.width}x{self.height}"
        return text if self.num_frames == 1 else f"{text}x{self.num_frames}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read "128x128" or, with frames, "832x480x81".

        Raises:
            ValueError: the text is something else.
        """
        match = _PATTERN.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"size {text!r} is not WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, such as 1024x1024")
        width, height, frames = match.groups()
        return cls(int(width), int(height), int(frames or 1))

    @classmethod
    def square(cls, side: int) -> Size:
        """A square picture."""
        return cls(side, side)

    @property
    def short_side(self) -> int:
        """The shorter side in pixels: `r` and `R` of Eq. 2 (480p to 720p counts as 1.5, whatever the widths)."""
        return min(self.width, self.height)

    @property
    def pixels(self) -> int:
        """Pixels over all frames."""
        return self.width * self.height * self.num_frames
