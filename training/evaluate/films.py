"""Films of a checkpoint, measured: is the motion the one that was asked for, how far, how steady is the ground."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmd.backbones.base import Backbone
from rmd.cascade import Cascade
from training.data.dataset import PictureSet
from training.data.films import FilmSource, FilmSpec, FilmSplit, render_films
from training.data.motions import MOTIONS, X, Y
from training.evaluate.motion import motion_of, track
from training.film_sheets import draw_films

TEST_FILMS: tuple[FilmSplit, ...] = ("unseen_pair", "unseen_motion", "unseen_concept")
TEST_SEED = 1


@dataclass(frozen=True)
class FilmSet:
    """Held-out films whose originals are read right: what no reader could tell is asked of no model.

    Attributes:
        split: which films.
        specs: of each.
        originals: (N, 3, T, H, W) uint8, as they were rendered.
        readable: share of the films drawn whose motion was read off the original.
    """

    split: FilmSplit
    specs: list[FilmSpec]
    originals: Tensor
    readable: float

    @property
    def prompts(self) -> list[str]:
        """The captions."""
        return [spec.caption for spec in self.specs]


def film_set(
    pictures: PictureSet, split: FilmSplit, count: int, side: int, fits: Callable[[str], bool] = lambda _caption: True
) -> FilmSet:
    """The first ``count`` readable films of a split."""
    source = FilmSource(pictures, split, TEST_SEED, fits)
    specs: list[FilmSpec] = []
    originals: list[Tensor] = []
    drawn = 0
    while len(specs) < count:
        spec = source.film(drawn)
        drawn += 1
        film = to_bytes(render_films([spec], pictures.rgba, (side,))[0])[0]
        found = track(film.numpy())
        if found is not None and motion_of(found) == spec.motion:
            specs.append(spec)
            originals.append(film)
    return FilmSet(split, specs, torch.stack(originals), count / drawn)


def to_bytes(films: Tensor) -> Tensor:
    """uint8 from floats in [-1, 1]."""
    return ((films + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def measure_films(films: Tensor, test: FilmSet) -> dict[str, Any]:
    """The figures of one model on one set.

    Args:
        films: (N, 3, T, H, W) uint8, one a film of the set.

    Returns:
        ``motion``, the share read as asked, its standard error, and by motion; ``displacement``, the median error in
        pixels of the straight way of things that move along; ``flicker``, the mean change of the frames' edges from
        frame to frame, of 255; ``read``, what was read off each film.
    """
    read: list[str] = []
    errors: list[float] = []
    by_motion: dict[str, list[bool]] = {}
    side = films.shape[-1]
    for film, spec in zip(films, test.specs, strict=True):
        found = track(film.numpy())
        read.append("nothing" if found is None else motion_of(found))
        by_motion.setdefault(spec.motion, []).append(read[-1] == spec.motion)
        if found is not None and MOTIONS[spec.motion].direction is not None:
            way = spec.paths(films.shape[2])[0]
            wanted = way[-1, [X, Y]] - way[0, [X, Y]]
            errors.append(side * math.hypot(*(found.displacement - wanted)))
    right = [motion == spec.motion for motion, spec in zip(read, test.specs, strict=True)]
    share = sum(right) / len(right)
    return {
        "films": len(films),
        "motion": share,
        "motion_error": math.sqrt(share * (1 - share) / len(right)),
        "by_motion": {name: f"{sum(hits)} of {len(hits)}" for name, hits in sorted(by_motion.items())},
        "displacement": float(np.median(errors)) if errors else None,
        "flicker": _flicker(films.numpy()),
        "read": read,
    }


def evaluate_films(
    backbone: Backbone, cascade: Cascade, sets: Sequence[FilmSet], seed: int = 0, batch: int = 8
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Draws every set's prompts and measures the films; figures and films by split."""
    figures, drawn = {}, {}
    for test in sets:
        films = draw_films(backbone, cascade, test.prompts, seed, batch)
        figures[str(test.split)], drawn[str(test.split)] = measure_films(films, test), films
    return figures, drawn


def _flicker(films: NDArray[np.uint8]) -> float:
    """Mean absolute change from frame to frame of the outermost pixels, median over films: things seldom touch them."""
    edges = films[..., [0, -1], :].astype(np.float64)
    change = np.abs(np.diff(edges, axis=2)).mean((1, 2, 3, 4))
    return float(np.median(change))
