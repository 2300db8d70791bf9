"""Measures any student on the held-out sets with the evaluation's own parts, and keeps what pairs can be made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rmd.backbones.base import Backbone
from rmd.cascade import Cascade
from training.embedded.data.dataset import PictureSet
from training.evaluate.embedded.alignment import fit_projection, text_features
from training.evaluate.embedded.measure import RowResult, SetMeasurer, reference_rows
from training.evaluate.embedded.models import EvaluationSettings
from training.evaluate.embedded.rows import PictureCache, Pictures, generate
from training.evaluate.embedded.sets import concept_text, held_out_set, measured_indices
from training.evaluate.embedded.sheets import chosen
from training.evaluate.embedded.store import FeatureStore
from training.lab.grid import Evaluation


class LabMeasurer:
    """Everything that all rows are measured against, computed once and cached.

    Args:
        data: the picture cache, at the teacher's side.
        cache: of generated pictures and features.
        backbone: whose text encoder the projection is fitted to.
        check: called between batches; it may raise to stop.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        data: Path,
        cache: Path,
        backbone: Backbone,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.evaluation, self.check = evaluation, check
        self.cache = PictureCache(cache)
        settings = EvaluationSettings(
            checkpoint=Path(), feature_dtype=evaluation.features, device=str(backbone.device.type)
        )
        self.store = FeatureStore(self.cache, settings, lambda _what, _share: check())
        self.pictures = PictureSet.load(data)
        self.tests = [held_out_set(self.pictures, name, evaluation.limit) for name in evaluation.sets]
        train = self.pictures.indices("train")
        train_features = self.store.of_set(self.pictures, train)
        position = {index: row for row, index in enumerate(train)}
        fitted = measured_indices(self.pictures, "train")
        records = [self.pictures.records[i] for i in fitted]
        described = [concept_text(record) for record in records]
        texts, row_of = text_features(
            [*described, *(text for test in self.tests for text in test.texts)],
            lambda batch: backbone.encode_prompts(batch)["pooled_projections"],
        )
        projection = fit_projection(
            train_features[torch.tensor([position[i] for i in fitted])],
            texts[torch.tensor([row_of[text] for text in described])],
            [record.base_hexcode for record in records],
        )
        self.measurers = [
            SetMeasurer(
                test,
                self.store.of_set(self.pictures, test.indices),
                train_features,
                projection,
                texts[torch.tensor([row_of[text] for text in test.texts])],
            )
            for test in self.tests
        ]

    def sets(self) -> dict[str, Any]:
        """What is common to all rows: each set's concepts, chance, floor and the originals' own figures."""
        found: dict[str, Any] = {}
        for measurer in self.measurers:
            floor, rows = reference_rows(
                measurer, self.pictures, lambda indices: self.store.of_set(self.pictures, indices)
            )
            found[measurer.test.name] = {
                "pictures": len(measurer.test.indices),
                "concepts": list(measurer.test.targets),
                "chance": measurer.chance(),
                "floor": {name: estimate.to_dict() for name, estimate in floor.items()},
                "originals": {name: estimate.to_dict() for name, estimate in rows[0].metrics.items()},
            }
        return found

    def measure(self, backbone: Backbone, weights: str, cascade: Cascade) -> dict[str, Any]:
        """One student under one cascade: by set, ranks of every picture and the distances of every sampling seed.

        Args:
            weights: digest of the denoiser's weights.
        """
        found: dict[str, Any] = {}
        for measurer in self.measurers:
            features = []
            for seed in self.evaluation.seeds:
                drawn = self._draw(backbone, weights, cascade, measurer.test.prompts, measurer.test.seeds(seed))
                features.append(torch.cat([self._features(drawn[at : at + 64]) for at in range(0, len(drawn), 64)]))
            found[measurer.test.name] = figures(measurer.measure("", "", features))
        return found

    def strip(self, backbone: Backbone, weights: str, cascade: Cascade, path: Path) -> None:
        """The pictures of a few hash-chosen prompts of the first set side by side, as a WebP of the teacher's side."""
        test, seed = self.tests[0], self.evaluation.seeds[0]
        places = chosen(test, self.evaluation.strip)
        side = self.pictures.rgba.shape[1]
        drawn = self._draw(
            backbone, weights, cascade, [test.prompts[i] for i in places], [test.seeds(seed)[i] for i in places]
        )
        sheet = Image.new("RGB", (side * len(places), side), "white")
        for column, picture in enumerate(drawn):
            sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (column * side, 0))
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, format="WEBP", quality=82)

    def strip_prompts(self) -> list[str]:
        """The prompts of :meth:`strip`."""
        return [self.tests[0].prompts[i] for i in chosen(self.tests[0], self.evaluation.strip)]

    def _draw(
        self, backbone: Backbone, weights: str, cascade: Cascade, prompts: Sequence[str], seeds: Sequence[int]
    ) -> Pictures:
        self.check()
        return generate(
            backbone,
            weights,
            cascade,
            prompts,
            seeds,
            self.cache,
            batch=self.evaluation.batch,
            progress=lambda _count: self.check(),
        )

    def _features(self, pictures: Pictures) -> Tensor:
        self.check()
        return self.store.of(pictures)


def figures(result: RowResult) -> dict[str, Any]:
    """A measured row in JSON: ``text_ranks`` and ``picture_ranks``, one list a sampling seed in the set's order (0 is
    first, a tie counts half), ``kid`` and ``frechet``, one value a seed, and ``kid_deviation`` over subsets."""
    return {
        **{f"{name}_ranks": [[_plain(rank) for rank in seed.tolist()] for seed in ranks]
           for name, ranks in result.ranks.items()},
        "kid": [round(value, 3) for value in result.by_seed["kid"]],
        "kid_deviation": round(result.metrics["kid"].deviation, 3),
        "frechet": [round(value, 2) for value in result.by_seed["frechet"]],
        "nearest_training_cosine": round(result.metrics["nearest_training_cosine"].value, 4),
    }  # fmt: skip


def _plain(rank: float) -> float | int:
    return int(rank) if rank.is_integer() else rank
