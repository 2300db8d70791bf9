"""Lopsided pictures whose every motion can be seen, and films of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from training.embedded.data.dataset import PictureSet, Record
from training.embedded.data.films import FilmSpec, render_films
from training.evaluate.embedded.films import to_bytes

SIDE = 96


def many_pictures(concepts: int = 24) -> PictureSet:
    """Arrow-like shapes in strong colours, two thirds of them for training."""
    rgba = np.zeros((concepts, 64, 64, 4), np.uint8)
    colours = ((230, 120, 20), (20, 150, 160), (60, 110, 20), (200, 20, 140))
    splits = ("train", "train", "train", "train", "unseen_pair", "unseen_concept")
    records = []
    for n in range(concepts):
        rgba[n, 8:56, 24 : 34 + n % 3, :3] = colours[n % 4]
        rgba[n, 8:56, 24 : 34 + n % 3, 3] = 255
        rgba[n, 10:22, 10:54] = (250, 60, 60, 255)
        rgba[n, 10:16, 44:54] = (60, 60, 250, 255)
        code = f"1f4{n:02x}"
        records.append(Record(code, code, "noto", f"arrow {n}", ("shape",), 8, splits[n % 6]))  # type: ignore[arg-type]
    return PictureSet(records, rgba)


def film_bytes(pictures: PictureSet, spec: FilmSpec) -> NDArray[np.uint8]:
    """(9, SIDE, SIDE, 3) uint8."""
    film: NDArray[np.uint8] = to_bytes(render_films([spec], pictures.rgba, (SIDE,))[0])[0]
    return film
