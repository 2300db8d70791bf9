"""Films for the embedded film model: the rendered pictures, moved by rule. Synthetic, unlimited, and said to be so.

Film ``i`` of a split depends on the seed, the split and ``i`` alone. A film's caption says exactly what happens in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from training.embedded.data.captions import GROUNDS, STYLE_SHARE, WHITE, compose_caption
from training.embedded.data.dataset import PictureSet, Record
from training.embedded.data.motions import ANGLE, CROSSING, MOTIONS, OPACITY, PICTURE, SCALE, SPEEDS, Speed, X, Y, path
from training.embedded.data.split import unit_hash

FilmSplit = Literal["train", "unseen_pair", "unseen_concept", "unseen_motion"]
FILM_SPLITS: tuple[FilmSplit, ...] = get_args(FilmSplit)
FRAMES, FRAMES_PER_SECOND = 9, 8
RULES = 2
"""Of how a film is drawn from its number: counted up when they change, so that no cache mixes two."""

MOTION_SHARE = 0.06
"""Share of the (concept, motion) pairs that no training film shows: the set ``unseen_motion``."""
CROSSING_SHARE, COLOURED_SHARE = 0.1, 0.3
_TRIES = 200
_SCALE = (0.8, 1.0)
"""Of a thing, in frame sides: as large as the picture teacher draws it. At .6 of the frame and off its middle it has
lost most shapes (frames drawn alone after 46,000 of them: a floppy disk became a purse)."""
_SCALES = {CROSSING: (0.46, 0.58), "bouncing": (0.72, 0.92), "growing": (0.85, 1.05), "shrinking": (0.85, 1.05)}
_OFF_CENTRE = 0.04
_DOUBLE = ("right", "left", "up", "down")
"""Asked for most, and drawn twice as often as the others."""


@dataclass(frozen=True)
class FilmSpec:
    """All there is to know about one film.

    Attributes:
        pictures: positions in the picture set, two where things cross.
        motion: a key of ``MOTIONS``, or ``PICTURE``.
        speed, scale, centre: see :func:`training.embedded.data.motions.path`; one scale and centre a thing.
        ground: a key of ``GROUNDS``.
        caption: what the text encoder is given.
    """

    pictures: tuple[int, ...]
    motion: str
    speed: Speed
    scales: tuple[float, ...]
    centres: tuple[tuple[float, float], ...]
    ground: str
    caption: str

    def paths(self, frames: int) -> list[NDArray[np.float32]]:
        """One (frames, 5) a thing."""
        return [
            path(self.motion, self.speed, scale, centre, frames, second=number == 1)
            for number, (scale, centre) in enumerate(zip(self.scales, self.centres, strict=True))
        ]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)


def is_held_motion(base_hexcode: str, motion: str) -> bool:
    """Whether no training film shows this concept in this motion."""
    return unit_hash(f"motion:{base_hexcode}:{motion}") < MOTION_SHARE


def film_caption(
    records: Sequence[Record], motion: str, speed: Speed = "", ground: str = WHITE, rng: random.Random | None = None
) -> str:
    """``"<label>, <style> style, <motion>[ <speed>][, on a <ground> background]"``.

    Args:
        records: what is seen; two for things that cross.
        rng: draws another phrase for the motion in half of the captions, and drops the style from a tenth; None for the
            plain caption.
    """
    labels = " and ".join(record.label for record in records)
    phrases = MOTIONS[motion].phrases
    phrase, with_style = phrases[0], True
    if rng is not None:
        phrase = phrases[0] if rng.random() < 0.5 else rng.choice(phrases[1:])
        with_style = rng.random() < STYLE_SHARE
    parts = [labels]
    if with_style:
        parts.append(f"{records[0].style} style")
    parts.append(f"{phrase} {speed}" if speed else phrase)
    if ground != WHITE:
        parts.append(f"on a {ground} background")
    return ", ".join(parts)


class FilmSource:
    """The films of one split, by number.

    Args:
        pictures: the rendered pictures.
        split: which films: of training pictures (without the held (concept, motion) pairs), of those pairs alone, or of
            the pictures of a test set.
        seed: another seed, other films.
        fits: whether a caption fits the text encoder; one that does not is drawn anew.

    Raises:
        ValueError: the split has no pictures.
    """

    def __init__(
        self,
        pictures: PictureSet,
        split: FilmSplit = "train",
        seed: int = 0,
        fits: Callable[[str], bool] = lambda _caption: True,
    ) -> None:
        self.pictures, self.split, self.seed, self.fits = pictures, split, seed, fits
        self.rows = pictures.indices("train" if split == "unseen_motion" else split)
        if split == "unseen_motion":  # measured: no set that is only trained on
            self.rows = [i for i in self.rows if not pictures.records[i].training_only]
        if not self.rows:
            raise ValueError(f"there are no pictures of the split {split}")
        self.by_style: dict[str, list[int]] = {}
        for i in self.rows:
            self.by_style.setdefault(pictures.records[i].style, []).append(i)

    def film(self, index: int) -> FilmSpec:
        """Film ``index``, from 0.

        Raises:
            ValueError: no caption fits.
        """
        rng = random.Random(f"film:{self.seed}:{self.split}:{index}")
        return self._first_fitting(lambda: self._draw(rng))

    def picture(self, index: int) -> FilmSpec:
        """Single picture ``index``: its own captions, larger in the frame than a thing in a film."""
        rng = random.Random(f"picture:{self.seed}:{self.split}:{index}")
        return self._first_fitting(lambda: self._draw_picture(rng))

    def _first_fitting(self, draw: Callable[[], FilmSpec]) -> FilmSpec:
        for _ in range(_TRIES):
            spec = draw()
            if self.fits(spec.caption):
                return spec
        raise ValueError(f"none of {_TRIES} captions fits the text encoder, not even {spec.caption!r}")

    def _draw_picture(self, rng: random.Random) -> FilmSpec:
        row = rng.choice(self.rows)
        record, ground = self.pictures.records[row], self._ground(rng)
        caption = compose_caption(record.label, record.style, record.tags, rng, ground)
        scale = rng.uniform(0.75, 1.0)
        centre = self._centre(rng, 0.3 * (1 - scale) + 0.02)
        return FilmSpec((row,), PICTURE, "", (scale,), (centre,), ground, caption)

    def _draw(self, rng: random.Random) -> FilmSpec:
        records = self.pictures.records
        while True:  # a split without a single film of its own is one of fewer than some twenty concepts
            motion = CROSSING
            if rng.random() >= CROSSING_SHARE:
                single = [name for name in MOTIONS if name != CROSSING]
                motion = rng.choices(single, [2.0 if name in _DOUBLE else 1.0 for name in single])[0]
            row = rng.choice(self.rows)
            held = is_held_motion(records[row].base_hexcode, motion)
            if held == (self.split == "unseen_motion") or self.split in ("unseen_pair", "unseen_concept"):
                break
        speed: Speed = rng.choices(SPEEDS, (2, 1, 1))[0] if MOTIONS[motion].speeds else ""
        ground = self._ground(rng)
        rows: tuple[int, ...] = (row,)
        scales: tuple[float, ...] = (rng.uniform(*_SCALES.get(motion, _SCALE)),)
        centres: tuple[tuple[float, float], ...] = (self._centre(rng, _OFF_CENTRE),)
        if motion == CROSSING:
            rows = (row, self._companion(rng, row))
            scales = (scales[0], rng.uniform(*_SCALES[CROSSING]))
            apart = rng.choice((-1, 1)) * rng.uniform(0.08, 0.2)
            centres = ((0.5, 0.5 - apart), (0.5, 0.5 + apart))
        caption = film_caption([records[i] for i in rows], motion, speed, ground, rng)
        return FilmSpec(rows, motion, speed, scales, centres, ground, caption)

    def _companion(self, rng: random.Random, row: int) -> int:
        """Another concept's picture in the same style, or the same picture where there is none."""
        records = self.pictures.records
        for _ in range(100):
            other = rng.choice(self.by_style[records[row].style])
            if records[other].base_hexcode != records[row].base_hexcode:
                return other
        return row

    @staticmethod
    def _ground(rng: random.Random) -> str:
        if rng.random() >= COLOURED_SHARE:
            return WHITE
        return rng.choice([name for name in GROUNDS if name != WHITE])

    @staticmethod
    def _centre(rng: random.Random, spread: float) -> tuple[float, float]:
        return 0.5 + rng.uniform(-spread, spread), 0.5 + rng.uniform(-spread, spread)


def render_films(
    specs: Sequence[FilmSpec], rgba: NDArray[np.uint8], sides: Sequence[int], frames: int = FRAMES
) -> list[Tensor]:
    """The films in pixels, one tensor a side: (N, 3, frames, side, side) float32 in [-1, 1].

    Drawn at the largest side; the others are that one, shrunk.

    Args:
        rgba: (pictures, S, S, 4) uint8, straight alpha.
    """
    side = max(sides)
    films = torch.stack([_render(spec, rgba, side, frames) for spec in specs])  # (N, T, 3, H, W)
    flat, shape = films.flatten(0, 1), (len(specs), frames)
    shrunk = [
        flat if small == side else F.interpolate(flat, size=(small, small), mode="bilinear", antialias=True)
        for small in sides
    ]
    return [film.view(*shape, *film.shape[1:]).transpose(1, 2) for film in shrunk]


def _render(spec: FilmSpec, rgba: NDArray[np.uint8], side: int, frames: int) -> Tensor:
    """(frames, 3, side, side) in [-1, 1]."""
    ground = torch.tensor(GROUNDS[spec.ground]).float() / 255
    canvas = ground[None, :, None, None].expand(frames, -1, side, side)
    for row, way in reversed(list(zip(spec.pictures, spec.paths(frames), strict=True))):  # the first in front
        texture = _texture(rgba[row], round(1.25 * side * float(way[:, SCALE].max())))
        layer = _place(texture, torch.from_numpy(way), side)
        canvas = canvas * (1 - layer[:, 3:]) + layer[:, :3]
    return canvas * 2 - 1


def _texture(picture: NDArray[np.uint8], side: int) -> Tensor:
    """(4, side, side) premultiplied colour and alpha in [0, 1]: little larger than it is drawn, so that nothing
    glitters."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    sprite = torch.cat([pixels[:3] * pixels[3:], pixels[3:]])
    small: Tensor = F.interpolate(sprite[None], size=(side, side), mode="bilinear", antialias=True)[0]
    return small


def _place(texture: Tensor, way: Tensor, side: int) -> Tensor:
    """(frames, 4, side, side): a thing on its way, premultiplied.

    Args:
        texture: (4, S, S).
        way: (frames, 5), see :func:`training.embedded.data.motions.path`.
    """
    x, y, scale = 2 * way[:, X] - 1, 2 * way[:, Y] - 1, way[:, SCALE]
    cos, sin = torch.cos(way[:, ANGLE]) / scale, torch.sin(way[:, ANGLE]) / scale
    back = torch.stack([cos, sin, -(cos * x + sin * y), -sin, cos, sin * x - cos * y], 1).view(-1, 2, 3)
    grid = F.affine_grid(back, [len(way), 4, side, side], align_corners=False)
    source = texture.expand(len(way), -1, -1, -1)
    layer = F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return layer * way[:, OPACITY, None, None, None]
