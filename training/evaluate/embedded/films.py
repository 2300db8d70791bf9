"""Held-out films, and what is measured of a model's films of them: by pixels alone, and on one frame's features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.embedded.data.dataset import PictureSet
from training.embedded.data.films import FRAMES, FilmSource, FilmSpec, FilmSplit, render_films
from training.embedded.data.motions import CROSSING, MOTIONS, X, Y
from training.embedded.data.split import unit_hash
from training.evaluate.embedded.motion import FOREGROUND, apart_from_ground, motion_of, track
from training.evaluate.embedded.sets import concept_text, measured_indices, without_twins

Films = NDArray[np.uint8]
TEST_FILMS: tuple[FilmSplit, ...] = ("unseen_pair", "unseen_motion", "unseen_concept")
FILM_TITLES: dict[str, str] = {
    "unseen_pair": "Unseen pairs (a concept known in other styles)",
    "unseen_motion": "Unseen motions (a known thing, never seen in this motion)",
    "unseen_concept": "Unseen concepts (never trained on in any style, nor a twin of theirs in the same one)",
    "train": "Training films (for choosing among checkpoints, not a test)",
}
_TEST_SEED = 1
_FADING = ("fading in", "fading out")
_MARGIN = 1.15


@dataclass(frozen=True)
class FilmSet:
    """Films whose originals are read right: what no reader could tell is asked of no model.

    Attributes:
        split: which films.
        specs: of each.
        originals: (N, T, H, W, 3) uint8, as they were rendered.
        readable: share of the films drawn whose motion was read off the original.
        concepts: distinct base hexcodes of the things in front, sorted: the gallery.
        texts: of each concept: its label and tags.
        targets: each film's place in ``concepts``.
    """

    split: FilmSplit
    specs: list[FilmSpec]
    originals: Films
    readable: float
    concepts: tuple[str, ...]
    texts: tuple[str, ...]
    targets: tuple[int, ...]

    @property
    def prompts(self) -> list[str]:
        """The captions."""
        return [spec.caption for spec in self.specs]

    def part(self, places: Sequence[int]) -> FilmSet:
        """Some of the films, against the same gallery."""
        return replace(
            self,
            specs=[self.specs[place] for place in places],
            originals=self.originals[list(places)],
            targets=tuple(self.targets[place] for place in places),
        )

    def seeds(self, seed: int) -> list[int]:
        """One noise seed a film, by its caption: the same whatever the size of the set."""
        return [int(unit_hash(f"{seed}:{text}") * 2**31) for text in self.prompts]


def film_set(
    pictures: PictureSet,
    split: FilmSplit,
    count: int,
    side: int,
    fits: Callable[[str], bool] = lambda _caption: True,
    skip: int = 0,
    frames: int = FRAMES,
) -> FilmSet:
    """``count`` readable films of a split, after the first ``skip``.

    A test set leaves out what has a twin in training, and what is there to be trained on only.

    Raises:
        ValueError: the split has no pictures.
    """
    source = FilmSource(pictures, split, _TEST_SEED, fits)
    held = split in ("unseen_pair", "unseen_concept")
    source.rows = without_twins(pictures, split) if held else measured_indices(pictures, "train")  # type: ignore[arg-type]
    if not source.rows:
        raise ValueError(f"every picture of the split {split} has a twin in training")
    specs: list[FilmSpec] = []
    originals: list[Films] = []
    drawn = 0
    while len(specs) < skip + count:
        spec = source.film(drawn)
        drawn += 1
        film = to_bytes(render_films([spec], pictures.rgba, (side,), frames)[0])[0]
        found = track(film)
        if found is not None and motion_of(found) == spec.motion:
            specs.append(spec)
            originals.append(film)
    specs, originals = specs[skip:], originals[skip:]
    records = [pictures.records[spec.pictures[0]] for spec in specs]
    text_of = {record.base_hexcode: concept_text(record) for record in records}
    concepts = tuple(sorted(text_of))
    return FilmSet(
        split,
        specs,
        np.stack(originals),
        (skip + count) / drawn,
        concepts,
        tuple(text_of[concept] for concept in concepts),
        tuple(concepts.index(record.base_hexcode) for record in records),
    )


def to_bytes(films: Tensor) -> Films:
    """(N, T, H, W, 3) uint8 from (N, 3, T, H, W) in [-1, 1]."""
    array: Films = ((films + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).contiguous().numpy()
    return array


@dataclass(frozen=True)
class Readings:
    """What was read off the pixels of N films of a set.

    Attributes:
        read: each film's motion; "nothing" where there is only ground.
        right: (N,) whether it is the one asked for.
        way_off: error of the straight way, in pixels, of the films whose things move along.
        flicker: (N,) mean absolute change of the frames' outermost pixels from frame to frame, of 255: things seldom
            touch them, and the ground stands still.
    """

    read: list[str]
    right: Tensor
    way_off: list[float]
    flicker: NDArray[np.float64]

    def by_motion(self, test: FilmSet) -> dict[str, str]:
        """How many of each motion are right."""
        hits: dict[str, list[bool]] = {}
        for spec, right in zip(test.specs, self.right.tolist(), strict=True):
            hits.setdefault(spec.motion, []).append(right)
        return {name: f"{sum(found)} of {len(found)}" for name, found in sorted(hits.items())}


def read_films(films: Films, test: FilmSet) -> Readings:
    """Reads the motions off the films of a set, (N, T, H, W, 3) uint8, in the set's order."""
    read: list[str] = []
    way_off: list[float] = []
    for film, spec in zip(films, test.specs, strict=True):
        found = track(film)
        read.append("nothing" if found is None else motion_of(found))
        if found is not None and MOTIONS[spec.motion].direction is not None:
            way = spec.paths(len(film))[0]
            wanted = way[-1, [X, Y]] - way[0, [X, Y]]
            way_off.append(film.shape[1] * math.hypot(*(found.displacement - wanted)))
    right = torch.tensor([motion == spec.motion for motion, spec in zip(read, test.specs, strict=True)])
    edges = np.stack([films[:, :, [0, -1], :], films[:, :, :, [0, -1]].swapaxes(2, 3)]).astype(np.float32)
    flicker: NDArray[np.float64] = np.abs(np.diff(edges, axis=2)).mean((0, 2, 3, 4, 5), dtype=np.float64)
    return Readings(read, right, way_off, flicker)


def middle_frames(films: Films) -> Films:
    """(N, T, H, W, 3) -> (N, H, W, 3)."""
    return films[:, films.shape[1] // 2]


def training_frames(pictures: PictureSet, count: int, side: int) -> tuple[Films, list[int]]:
    """The middle frames of ``count`` training films, (count, side, side, 3), and the thing in front's picture of each.

    No film of two things, and none of a set that is never measured.
    """
    source = FilmSource(pictures, "train", _TEST_SEED)
    source.rows = measured_indices(pictures, "train")
    films = (source.film(number) for number in range(2 * count))
    specs = [spec for spec in films if spec.motion != CROSSING][:count]
    frames = [
        middle_frames(to_bytes(render_films(specs[start : start + 64], pictures.rgba, (side,), FRAMES)[0]))
        for start in range(0, len(specs), 64)
    ]
    return np.concatenate(frames), [spec.pictures[0] for spec in specs]


def single_things(test: FilmSet) -> list[int]:
    """Places of the films that show one thing: those whose frame is asked for its name."""
    return [place for place, spec in enumerate(test.specs) if spec.motion != CROSSING]


def lasting_things(test: FilmSet) -> list[int]:
    """Places of the films with one thing that is there from the first to the last frame."""
    return [place for place in single_things(test) if test.specs[place].motion not in _FADING]


def ends(films: Films, places: Sequence[int]) -> tuple[Films, Films]:
    """The thing cut out of the first and out of the last frame, (len(places), H, W, 3) each, wherever and however
    large it is; the whole frame where there is none."""
    cut = [[_cut_out(films[place], frame) for place in places] for frame in (0, films.shape[1] - 1)]
    return np.stack(cut[0]), np.stack(cut[1])


def _cut_out(film: Films, number: int) -> Films:
    """A square around what differs from the ground, at the film's own size."""
    side = film.shape[1]
    mask = apart_from_ground(film)[1][number] > FOREGROUND
    if mask.mean() < 0.002:
        whole: Films = film[number]
        return whole
    rows, columns = np.nonzero(mask)
    # Quantiles: a few stray pixels are no part of the thing.
    (top, bottom), (left, right) = np.quantile(rows, (0.01, 0.99)), np.quantile(columns, (0.01, 0.99))
    extent = max(4.0, _MARGIN * (max(bottom - top, right - left) + 1))
    axis = torch.linspace(-1, 1, side) * extent / side
    x = axis + (left + right + 1) / side - 1
    y = axis + (top + bottom + 1) / side - 1
    grid = torch.stack([x.expand(side, side), y[:, None].expand(side, side)], -1).float()
    pixels = torch.from_numpy(film[number].astype(np.float32)).permute(2, 0, 1)
    square = torch.nn.functional.grid_sample(pixels[None], grid[None], padding_mode="border", align_corners=False)[0]
    cut: Films = square.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return cut
