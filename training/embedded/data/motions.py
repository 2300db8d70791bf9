"""The motions of the films: their words, and where a thing is in each frame."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Speed = Literal["", "slowly", "fast"]
SPEEDS: tuple[Speed, ...] = ("", "slowly", "fast")

CROSSING = "crossing"
"""Two things pass each other: the first to the right, the second to the left."""
PICTURE = "picture"
"""A single picture, no film."""

_DIAGONAL = math.sqrt(0.5)


@dataclass(frozen=True)
class Motion:
    """One motion.

    Attributes:
        phrases: how captions say it; the first is the usual one, in half of them.
        direction: where to, in frame sides: x to the right, y downwards; None for motions that stay where they are.
        speeds: whether captions may say "slowly" or "fast".
    """

    phrases: tuple[str, ...]
    direction: tuple[float, float] | None = None
    speeds: bool = True


MOTIONS: Mapping[str, Motion] = {
    "right": Motion(("moving left to right", "moving right", "moving to the right"), (1, 0)),
    "left": Motion(("moving right to left", "moving left", "moving to the left"), (-1, 0)),
    "up": Motion(("moving up", "moving upwards", "rising"), (0, -1)),
    "down": Motion(("moving down", "moving downwards", "falling"), (0, 1)),
    "up right": Motion(("moving up and to the right", "moving diagonally up right"), (_DIAGONAL, -_DIAGONAL)),
    "up left": Motion(("moving up and to the left", "moving diagonally up left"), (-_DIAGONAL, -_DIAGONAL)),
    "down right": Motion(("moving down and to the right", "moving diagonally down right"), (_DIAGONAL, _DIAGONAL)),
    "down left": Motion(("moving down and to the left", "moving diagonally down left"), (-_DIAGONAL, _DIAGONAL)),
    "clockwise": Motion(("turning clockwise", "turning right", "spinning clockwise")),
    "counterclockwise": Motion(("turning counterclockwise", "turning left", "spinning counterclockwise")),
    "growing": Motion(("growing", "getting bigger")),
    "shrinking": Motion(("shrinking", "getting smaller")),
    "bouncing": Motion(("bouncing", "bouncing up and down", "jumping"), speeds=False),
    "fading in": Motion(("fading in", "appearing"), speeds=False),
    "fading out": Motion(("fading out", "disappearing"), speeds=False),
    "still": Motion(("standing still", "not moving"), speeds=False),
    CROSSING: Motion(("crossing", "passing each other"), speeds=False),
}
"""By name. A linear classifier on the text encoder's token states tells all of these phrases apart."""

_DISTANCE: Mapping[Speed, float] = {"": 0.3, "slowly": 0.16, "fast": 0.5}
_TURN: Mapping[Speed, float] = {"": 135.0, "slowly": 60.0, "fast": 270.0}
_SMALLEST: Mapping[Speed, float] = {"": 0.5, "slowly": 0.7, "fast": 0.33}
_HEIGHT = 0.22
_CROSSED = 0.7

X, Y, SCALE, ANGLE, OPACITY = range(5)
"""Columns of a path: centre in frame sides (y downwards), side of the thing in frame sides, angle in radians
(clockwise), opacity."""


def path(
    motion: str, speed: Speed, scale: float, centre: tuple[float, float], frames: int, second: bool = False
) -> NDArray[np.float32]:
    """Where the thing is: (frames, 5), columns as above.

    Args:
        motion: a key of :data:`MOTIONS`, or :data:`PICTURE`.
        speed: how fast; ignored by motions without speeds.
        scale: side of the thing in frame sides, at its largest.
        centre: middle of its way.
        frames: number of frames.
        second: of two crossing things, the one that goes to the left.
    """
    u = np.linspace(0.0, 1.0, frames) if frames > 1 else np.zeros(1)
    way = np.tile(np.array([*centre, scale, 0.0, 1.0]), (frames, 1))
    if motion == PICTURE:
        return way.astype(np.float32)
    direction = MOTIONS[motion].direction
    if motion == CROSSING:
        way[:, X] += (-1 if second else 1) * _CROSSED * (u - 0.5)
    elif direction is not None:
        way[:, X] += direction[0] * _DISTANCE[speed] * (u - 0.5)
        way[:, Y] += direction[1] * _DISTANCE[speed] * (u - 0.5)
    elif motion in ("clockwise", "counterclockwise"):
        way[:, ANGLE] = math.radians(_TURN[speed]) * u * (1 if motion == "clockwise" else -1)
    elif motion in ("growing", "shrinking"):
        size = _SMALLEST[speed] + (1 - _SMALLEST[speed]) * u
        way[:, SCALE] *= size if motion == "growing" else size[::-1]
    elif motion == "bouncing":
        way[:, Y] += _HEIGHT * (0.5 - np.abs(np.sin(2 * np.pi * u)))
    elif motion in ("fading in", "fading out"):
        way[:, OPACITY] = u if motion == "fading in" else u[::-1]
    return way.astype(np.float32)
