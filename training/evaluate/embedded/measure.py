"""One row's numbers on one test set, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.embedded.data.dataset import PictureSet
from training.evaluate.embedded.alignment import Projection
from training.evaluate.embedded.sets import HeldOutSet, other_style_pictures, same_style_mix
from training.evaluate.shared.metrics import (
    Estimate,
    frechet_distance,
    kid,
    log_rank,
    over_seeds,
    ranks_of_target,
    recall,
    recall_at,
    unit_rows,
)

RECALLS = (1, 5)


@dataclass
class RowResult:
    """What one row reached on one set.

    Attributes:
        key, title: of the row.
        evaluations: network passes a picture, None for rows that no diffusion model made.
        metrics: name -> estimate.
        by_seed: name -> one value a sampling seed.
        ranks: name of the retrieval -> ranks (N,), one a seed; for ratios, not written out.
        concepts: name of the retrieval -> (N,) the concept of each picture; likewise.
        details: whatever else goes into the report's JSON.
        note: what else to know.
    """

    key: str
    title: str
    evaluations: int | None = None
    metrics: dict[str, Estimate] = field(default_factory=dict)
    by_seed: dict[str, list[float]] = field(default_factory=dict)
    ranks: dict[str, list[Tensor]] = field(default_factory=dict)
    concepts: dict[str, Tensor] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As written to ``quality.json``."""
        return {
            "row": self.key,
            "title": self.title,
            "evaluations": self.evaluations,
            "metrics": {name: estimate.to_dict() for name, estimate in self.metrics.items()},
            "by_seed": self.by_seed,
            **self.details,
            "note": self.note,
        }


class SetMeasurer:
    """Measures feature sets against one held-out set.

    Attributes:
        test: the set.
        real: (N, 1280) features of its real pictures.
        train: (M, 1280) features of the training pictures.
        concept_texts: (G, T) text features of the gallery's concepts.
    """

    def __init__(
        self, test: HeldOutSet, real: Tensor, train: Tensor, projection: Projection, concept_texts: Tensor
    ) -> None:
        self.test = test
        self.real = real
        self.train = unit_rows(train)
        self.projection = projection
        self.concept_texts = concept_texts
        self.targets = torch.tensor(test.targets)

    def measure(self, key: str, title: str, features: Sequence[Tensor], evaluations: int | None = None) -> RowResult:
        """All metrics of one row: one feature tensor (N, 1280), in the set's order, a sampling seed."""
        result = RowResult(key, title, evaluations)
        distances = [kid(row, self.real) for row in features]
        frechet = [Estimate(frechet_distance(row, self.real), 0.0, "one sampling") for row in features]
        result.metrics["kid"] = over_seeds(distances)
        result.metrics["frechet"] = over_seeds(frechet)
        result.by_seed["kid"] = [value.value for value in distances]
        result.by_seed["frechet"] = [value.value for value in frechet]
        self._retrieve(result, "text", [self.text_ranks(row) for row in features], self.targets)
        self._retrieve(result, "picture", [self.picture_ranks(row) for row in features], self.targets)
        nearest = torch.stack([(unit_rows(row) @ self.train.T).max(1).values for row in features])
        result.metrics["nearest_training_cosine"] = Estimate(
            float(nearest.mean()), float(nearest.mean(0).std(correction=0)), "pictures (spread, not an error)"
        )
        return result

    def measure_others(
        self, key: str, title: str, rows: Sequence[int], features: Tensor, own: Sequence[int]
    ) -> RowResult:
        """Retrieval alone, for real pictures that stand for some of the set's rows.

        Args:
            rows: places in the set.
            features: (len(rows), 1280).
            own: for each, its own place in the set if it is one of the gallery's pictures, else -1: no picture may
                find itself.
        """
        result = RowResult(key, title)
        targets = self.targets[torch.tensor(rows)]
        scores = self.projection.scores(features, self.concept_texts)
        self._retrieve(result, "text", [ranks_of_target(scores, targets)], targets)
        similarity = unit_rows(features) @ unit_rows(self.real).T
        for row, place in enumerate(own):
            if place >= 0:
                similarity[row, place] = -torch.inf
        self._retrieve(result, "picture", [ranks_of_target(self._by_concept(similarity), targets)], targets)
        return result

    def text_ranks(self, features: Tensor) -> Tensor:
        """Ranks of each picture's own concept among the gallery's texts."""
        return ranks_of_target(self.projection.scores(features, self.concept_texts), self.targets)

    def picture_ranks(self, features: Tensor) -> Tensor:
        """Ranks of each picture's own concept by the nearest real picture of each concept in this set."""
        return ranks_of_target(self._by_concept(unit_rows(features) @ unit_rows(self.real).T), self.targets)

    def _by_concept(self, similarity: Tensor) -> Tensor:
        """(R, N) to pictures -> (R, G) to concepts: the nearest of a concept's pictures counts."""
        scores = torch.full((len(similarity), len(self.test.concepts)), -torch.inf)
        columns = self.targets.expand(len(similarity), -1)
        return scores.scatter_reduce(1, columns, similarity, "amax")

    def _retrieve(self, result: RowResult, name: str, ranks: list[Tensor], concepts: Tensor) -> None:
        result.ranks[name], result.concepts[name] = ranks, concepts
        for k in RECALLS:
            result.metrics[f"{name}_r{k}"] = recall(ranks, k, concepts)
            result.by_seed[f"{name}_r{k}"] = [recall_at(k, seed) for seed in ranks]
        result.metrics[f"{name}_log_rank"] = log_rank(ranks, concepts)

    def chance(self) -> dict[str, float]:
        """Recall of a guess."""
        return {f"r{k}": min(1.0, k / len(self.test.concepts)) for k in RECALLS}


def reference_rows(
    measurer: SetMeasurer, pictures: PictureSet, features_of: Callable[[Sequence[int]], Tensor]
) -> tuple[dict[str, Estimate], list[RowResult]]:
    """The real-against-real floor, and the rows of real pictures.

    Args:
        features_of: positions in the picture set -> (n, 1280) features.

    Returns:
        the floor's distances, and the rows "real" (the held-out pictures themselves) and "other-style".
    """
    test = measurer.test
    mix = features_of(same_style_mix(pictures, test))
    floor = {
        "kid": kid(mix, measurer.real),
        "frechet": Estimate(frechet_distance(mix, measurer.real), 0.0, "one sampling"),
    }
    real = RowResult("real", "held-out originals (the ceiling of text R@k)")
    measurer._retrieve(real, "text", [measurer.text_ranks(measurer.real)], measurer.targets)
    nearest = (unit_rows(measurer.real) @ measurer.train.T).max(1).values
    real.metrics["nearest_training_cosine"] = Estimate(
        float(nearest.mean()), float(nearest.std(correction=0)), "pictures (spread, not an error)"
    )
    others = other_style_pictures(pictures, test)
    rows = [row for row, other in enumerate(others) if other is not None]
    rows_of = {index: row for row, index in enumerate(test.indices)}
    chosen = [other for other in others if other is not None]
    found = [real]
    if len(rows) > 1:
        found.append(
            measurer.measure_others(
                "other-style",
                "the same concept's original in another style",
                rows,
                features_of(chosen),
                [rows_of.get(index, -1) for index in chosen],
            )
        )
    return floor, found


def style_counts(test: HeldOutSet) -> Mapping[str, int]:
    """Pictures of each style in a set."""
    styles, counts = np.unique([record.style for record in test.records], return_counts=True)
    return {str(style): int(count) for style, count in zip(styles, counts, strict=True)}
