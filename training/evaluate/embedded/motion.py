"""Which motion a film shows, read off its pixels: no network, nothing fitted.

The ground is the colour that the frames' edges have most; what differs from it is the thing. Its centre, size, strength
and angle in every frame decide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.embedded.data.motions import CROSSING

Array = NDArray[np.float64]

FOREGROUND = 0.1
"""Largest channel's difference from the ground, of 1, above which a pixel belongs to the thing."""
_MOVED = 0.12
_GROWN = math.log(1.2)
_PARTED = 1.35
_TURNED = math.radians(25)
_ANGLES, _RADII = 120, 20
_COMPASS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")


@dataclass(frozen=True)
class Track:
    """The thing in every frame; T frames.

    Attributes:
        centre: (T, 2) x and y in frame sides, y downwards; of an empty frame, that of the nearest other one.
        spread: (T,) standard deviation in x.
        size: (T,) root of the area, in frame sides.
        strength: (T,) how much the thing differs from the ground, its strongest parts.
        turn: (T - 1,) radians clockwise from each frame to the next.
    """

    centre: Array
    spread: Array
    size: Array
    strength: Array
    turn: Array

    @property
    def displacement(self) -> Array:
        """(2,) the straight way from first to last frame, by least squares."""
        u = np.linspace(-0.5, 0.5, len(self.centre))
        way: Array = (u[:, None] * self.centre).sum(0) / (u**2).sum()
        return way


def apart_from_ground(film: NDArray[np.uint8]) -> tuple[Array, Array]:
    """The frames in [0, 1], (T, H, W, 3), and each pixel's largest difference from the ground's colour, (T, H, W)."""
    frames = film.astype(np.float64) / 255
    return frames, np.abs(frames - _ground(frames)).max(-1)


def track(film: NDArray[np.uint8]) -> Track | None:
    """Follows the thing through a film; None where there is nothing but ground.

    Args:
        film: (T, H, W, 3) uint8.
    """
    frames, difference = apart_from_ground(film)
    mask = difference > FOREGROUND
    area = mask.mean((1, 2))
    seen = np.flatnonzero(area > 0.002)
    if len(seen) < 2:
        return None
    side = film.shape[-2]
    axis = (np.arange(side) + 0.5) / side
    weight = np.where(mask, difference, 0.0)
    total = weight.sum((1, 2)).clip(1e-9)
    x = (weight.sum(1) * axis).sum(1) / total
    y = (weight.sum(2) * axis).sum(1) / total
    nearest = seen[np.abs(np.arange(len(area))[:, None] - seen).argmin(1)]
    centre = np.stack([x, y], 1)[nearest]
    spread = np.sqrt((weight.sum(1) * (axis - centre[:, :1]) ** 2).sum(1) / total)
    polar = [_polar(frames[t], centre[t]) for t in range(len(area))]
    turn = [_turned(polar[t], polar[t + 1]) for t in range(len(area) - 1)]
    strength = [np.percentile(d[m], 95) if m.any() else 0.0 for d, m in zip(difference, mask, strict=True)]
    return Track(centre, spread, np.sqrt(area), np.array(strength), np.array(turn))


def read_motion(film: NDArray[np.uint8]) -> str:
    """The motion's name, a key of ``MOTIONS``; "nothing" where there is only ground.

    Args:
        film: (T, H, W, 3) uint8.
    """
    found = track(film)
    return "nothing" if found is None else motion_of(found)


def motion_of(found: Track) -> str:
    """The motion's name, a key of ``MOTIONS``."""
    u = np.linspace(0, 1, len(found.centre))
    strength = found.strength / found.strength.max()
    if strength[0] < 0.4 and strength[-1] > 0.7:
        return "fading in"
    if strength[-1] < 0.4 and strength[0] > 0.7:
        return "fading out"
    way = found.displacement
    far = math.hypot(*way)
    hop = _correlation(found.centre[:, 1], -np.abs(np.sin(2 * np.pi * u)))
    if hop > 0.8 and np.ptp(found.centre[:, 1]) > 0.1 and far < 2 * _MOVED:
        return "bouncing"
    middle = found.spread[len(u) // 2]
    if min(found.spread[0], found.spread[-1]) > _PARTED * middle:
        return CROSSING
    turned = float(np.median(found.turn)) * len(found.turn)
    steady = float((np.sign(found.turn) == np.sign(turned)).mean())
    if abs(turned) > 1.5 * _TURNED and steady > 0.85 and far < 2 * _MOVED:  # what is lopsided moves as it turns
        return _turning(turned)
    if far > _MOVED:
        return _COMPASS[round(math.atan2(way[1], way[0]) / (math.pi / 4)) % 8]
    grown = float(np.polyfit(u, np.log(found.size.clip(1e-3)), 1)[0])
    if abs(grown) > _GROWN:
        return "growing" if grown > 0 else "shrinking"
    if abs(turned) > _TURNED:
        return _turning(turned)
    return "still"


def _turning(turned: float) -> str:
    return "clockwise" if turned > 0 else "counterclockwise"


def _ground(frames: Array) -> Array:
    """(3,) the commonest colour of the edges, to a sixteenth, then their mean."""
    edges = np.concatenate([frames[:, :3].reshape(-1, 3), frames[:, -3:].reshape(-1, 3),
                            frames[:, :, :3].reshape(-1, 3), frames[:, :, -3:].reshape(-1, 3)])  # fmt: skip
    median = np.median(edges, axis=0)
    near = np.abs(edges - median).max(1) < 0.06
    if near.mean() > 0.3:
        mean: Array = edges[near].mean(0)
        return mean
    coarse = (edges * 16).astype(int) @ np.array([1, 32, 1024])
    values, counts = np.unique(coarse, return_counts=True)
    common: Array = edges[coarse == values[counts.argmax()]].mean(0)
    return common


def _polar(frame: Array, centre: Array) -> Array:
    """(angles, radii, 3) the frame around a point, clockwise from the x axis."""
    side = frame.shape[0]
    angles = np.arange(_ANGLES) * 2 * np.pi / _ANGLES
    radii = (np.arange(_RADII) + 1) / _RADII * 0.35
    x = centre[0] + radii * np.cos(angles)[:, None]
    y = centre[1] + radii * np.sin(angles)[:, None]
    column = np.clip((x * side).astype(int), 0, side - 1)
    row = np.clip((y * side).astype(int), 0, side - 1)
    values: Array = frame[row, column] * radii[:, None]
    centred: Array = values - values.mean(0)
    return centred


def _turned(first: Array, second: Array) -> float:
    """Radians by which the second picture is the first one turned, within 45 degrees either way."""
    spectrum = np.conj(np.fft.fft(first, axis=0)) * np.fft.fft(second, axis=0)
    match = np.fft.ifft(spectrum.sum((1, 2))).real
    widest = _ANGLES // 8
    shifts = np.arange(-widest, widest + 1)
    score = match[shifts % _ANGLES]
    best = int(score.argmax())
    offset = 0.0
    if 0 < best < len(score) - 1:  # the top of a parabola through three points
        before, top, after = score[best - 1 : best + 2]
        bend = before - 2 * top + after
        offset = 0.5 * (before - after) / bend if bend < 0 else 0.0
    return float((shifts[best] + offset) * 2 * np.pi / _ANGLES)


def _correlation(a: Array, b: Array) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / size if size > 1e-9 else 0.0
