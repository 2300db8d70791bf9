"""The evaluation of a film checkpoint: rows and sets as for pictures, what moves read off the pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.embedded.data.dataset import PictureSet
from training.embedded.data.films import FilmSplit
from training.embedded.data.motions import MOTIONS
from training.evaluate.embedded.alignment import Projection, fit_projection, text_features
from training.evaluate.embedded.film_report import film_set_report, write_film_report
from training.evaluate.embedded.films import (
    FILM_TITLES,
    TEST_FILMS,
    Films,
    FilmSet,
    Readings,
    ends,
    film_set,
    lasting_things,
    middle_frames,
    read_films,
    single_things,
    training_frames,
)
from training.evaluate.embedded.measure import RECALLS, RowResult
from training.evaluate.embedded.models import Models
from training.evaluate.embedded.rows import PictureCache, Row, generate, reconstruct
from training.evaluate.embedded.sets import concept_text
from training.evaluate.embedded.store import FeatureStore, Report
from training.evaluate.shared.metrics import (
    Estimate,
    kid,
    mean_over_concepts,
    over_seeds,
    ranks_of_target,
    recall,
    recall_at,
    unit_rows,
)
from training.evaluate.shared.provenance import command_line, environment

FILMS_OF_A_SET = 64
FITTED_FRAMES = 3000
"""Training films whose middle frames the text projection is fitted on."""
BATCH = 8


@dataclass
class FilmMeasurer:
    """Measures films against one set.

    Attributes:
        test: the set.
        store: of features.
        projection: from features of middle frames to text features.
        texts: (G, T) text features of the set's gallery.
    """

    test: FilmSet
    store: FeatureStore
    projection: Projection
    texts: Tensor

    def __post_init__(self) -> None:
        self.real = self.store.of(middle_frames(self.test.originals))
        self.named = single_things(self.test)
        self.lasting = lasting_things(self.test)
        self.targets = torch.tensor(self.test.targets)

    def measure(self, key: str, title: str, drawn: Sequence[Films], evaluations: int | None = None) -> RowResult:
        """All figures of one row: its films of every sampling seed."""
        result = RowResult(key, title, evaluations)
        readings = [read_films(films, self.test) for films in drawn]
        self._motion(result, readings)
        features = [self.store.of(middle_frames(films)) for films in drawn]
        self._names(result, features)
        if evaluations is not None or key == "autoencoder":  # the originals' own would be of a set to itself
            distances = [kid(row, self.real) for row in features]
            result.metrics["kid"] = over_seeds(distances)
            result.by_seed["kid"] = [value.value for value in distances]
        alike = [self._identity(films) for films in drawn]
        result.metrics["identity"] = mean_over_concepts(alike, self.targets[torch.tensor(self.lasting)])
        result.by_seed["identity"] = [float(row.mean()) for row in alike]
        return result

    def _motion(self, result: RowResult, readings: Sequence[Readings]) -> None:
        result.metrics["motion"] = mean_over_concepts([row.right.double() for row in readings], self.targets)
        result.by_seed["motion"] = [float(row.right.double().mean()) for row in readings]
        # As ranks, for the ratio over the teacher's: right is first.
        result.ranks["motion"] = [(~row.right).double() for row in readings]
        result.concepts["motion"] = self.targets
        for name, values in (
            ("way_off", [row.way_off for row in readings]),
            ("flicker", [list(row.flicker) for row in readings]),
        ):
            everything = [value for seed in values for value in seed]
            if everything:
                result.metrics[name] = Estimate(float(np.median(everything)), 0.0, "median over films")
        result.details["by_motion"] = [row.by_motion(self.test) for row in readings]
        result.details["read"] = [row.read for row in readings]

    def _names(self, result: RowResult, features: Sequence[Tensor]) -> None:
        named = torch.tensor(self.named)
        targets = self.targets[named]
        ranks = [ranks_of_target(self.projection.scores(row[named], self.texts), targets) for row in features]
        result.ranks["text"], result.concepts["text"] = ranks, targets
        for k in RECALLS:
            result.metrics[f"text_r{k}"] = recall(ranks, k, targets)
            result.by_seed[f"text_r{k}"] = [recall_at(k, seed) for seed in ranks]

    def _identity(self, films: Films) -> Tensor:
        """(N,) cosine of the thing's features in the first and in the last frame."""
        first, last = (unit_rows(self.store.of(cut)) for cut in ends(films, self.lasting))
        return (first * last).sum(1)

    def chance(self) -> dict[str, float]:
        """What a guess would reach; of identity, the originals' first frames beside other originals' last ones."""
        first, last = (unit_rows(self.store.of(cut)) for cut in ends(self.test.originals, self.lasting))
        gallery = len(self.test.concepts)
        return {
            "motion": 1 / len(MOTIONS),
            **{f"text_r{k}": min(1.0, k / gallery) for k in RECALLS},
            "identity": float((first * last.roll(1, 0)).sum(1).mean()),
        }


def evaluate_films(models: Models, report: Report = lambda _what, _share: None) -> dict[str, Any]:
    """Measures every row on the held-out films and writes ``films.json`` and ``films.md``.

    Args:
        models: the checkpoint, its teacher and the settings.
        report: called with what is being done and the share of it that is done.

    Returns:
        the content of ``films.json``.

    Raises:
        FileNotFoundError: a folder, the picture cache or the feature network is missing.
        ValueError: an unknown row or set.
    """
    settings = models.settings
    pictures = PictureSet.load(settings.data)
    tests = film_sets(models, pictures)
    cache = PictureCache(settings.cache)
    store = FeatureStore(cache, settings, report)
    teacher = models.load("teacher")
    autoencoder = models.autoencoder()
    rows = models.rows()
    projection, texts_of = _alignment(models, pictures, store, tests)
    entries = []
    for test in tests:
        measurer = FilmMeasurer(test, store, projection, texts_of(test.texts))
        results = [measurer.measure("originals", "held-out originals (the ceiling)", [test.originals])]
        frames = test.originals.reshape(-1, *test.originals.shape[2:])
        copies = reconstruct(autoencoder, frames).reshape(test.originals.shape)
        results.append(measurer.measure("autoencoder", "autoencoder alone", [copies]))
        for row in rows:
            drawn = draw_row(models, row, test, cache, report)
            results.append(measurer.measure(row.key, row.title, drawn, row.evaluations))
        entries.append(film_set_report(test, measurer.chance(), results))
    content: dict[str, Any] = {
        "report": "films",
        "command": command_line(),
        **environment(settings.device),
        **models.provenance(),
        "size": str(teacher.full_size),
        "text_alignment": {"penalty": projection.penalty, "training_frames": FITTED_FRAMES},
        "cascades": {row.key: row.cascade.to_dict() for row in rows},
        "sets": entries,
    }
    write_film_report(settings.out, content)
    return content


def film_sets(models: Models, pictures: PictureSet) -> list[FilmSet]:
    """The sets that the settings name, at the teacher's full size.

    Raises:
        ValueError: an unknown set.
    """
    settings = models.settings
    wanted = settings.sets or TEST_FILMS
    names: list[FilmSplit] = [name for name in (*TEST_FILMS, "train") if name in wanted]
    if len(names) != len(wanted):
        raise ValueError(f"sets {', '.join(wanted)}: give some of {', '.join(FILM_TITLES)}, each once")
    size, count = models.load("teacher").full_size, settings.limit or FILMS_OF_A_SET
    return [film_set(pictures, name, count, size.height, skip=settings.skip, frames=size.num_frames) for name in names]


def draw_row(models: Models, row: Row, test: FilmSet, cache: PictureCache, report: Report) -> list[Films]:
    """The row's films of a set, one array a sampling seed."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report(f"{test.split}: {row.key}", done / (len(test.specs) * len(row.seeds)))

    return [
        generate(
            models.load(row.weights),
            models.digest(row.weights),
            row.cascade,
            test.prompts,
            test.seeds(seed),
            cache,
            batch=min(models.settings.batch, BATCH),
            progress=advance,
        )
        for seed in row.seeds
    ]


def _alignment(
    models: Models, pictures: PictureSet, store: FeatureStore, tests: Sequence[FilmSet]
) -> tuple[Projection, Callable[[Sequence[str]], Tensor]]:
    """The projection fitted on training films' middle frames, and the features of a gallery's texts."""
    frames, rows = training_frames(pictures, FITTED_FRAMES, models.load("teacher").full_size.height)
    records = [pictures.records[row] for row in rows]
    described = [concept_text(record) for record in records]
    backbone = models.load("teacher")
    everything = [*described, *(text for test in tests for text in test.texts)]
    texts, row_of = text_features(everything, lambda batch: backbone.encode_prompts(batch)["pooled_projections"])

    def features(of: Sequence[str]) -> Tensor:
        return texts[torch.tensor([row_of[text] for text in of])]

    fitted = fit_projection(store.of(frames), features(described), [record.base_hexcode for record in records])
    return fitted, features
