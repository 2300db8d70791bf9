"""The two held-out sets as an evaluation sees them: prompts, real pictures and the gallery of concepts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.embedded.data.dataset import PictureSet, Record, caption
from training.embedded.data.split import Split, style_family, twin_of, unit_hash

TEST_SETS: tuple[Split, ...] = ("unseen_pair", "unseen_concept")
SETS: tuple[Split, ...] = (*TEST_SETS, "train")
TITLES: dict[str, str] = {
    "unseen_pair": "Unseen pairs (a concept known in other styles)",
    "unseen_concept": "Unseen concepts (never trained on in any style, nor a twin of theirs in the same one)",
    "train": "Training pictures (for choosing among checkpoints, not a test)",
}
LARGEST_SET = 512


@dataclass(frozen=True)
class HeldOutSet:
    """One test set, at most ``LARGEST_SET`` pictures.

    Attributes:
        name: its split.
        indices: positions in the picture set, in hash order: a smaller set is a prefix of a larger one.
        records: of those pictures.
        concepts: distinct base hexcodes, sorted: the gallery.
        texts: of each concept: its label and tags.
        targets: each picture's place in ``concepts``.
    """

    name: Split
    indices: tuple[int, ...]
    records: tuple[Record, ...]
    concepts: tuple[str, ...]
    texts: tuple[str, ...]
    targets: tuple[int, ...]

    @property
    def prompts(self) -> list[str]:
        """The plain captions."""
        return [caption(record) for record in self.records]

    def seeds(self, seed: int) -> list[int]:
        """One noise seed a picture, by its code and style: the same whatever the size of the set."""
        return [int(unit_hash(f"{seed}:{record.hexcode}:{record.style}") * 2**31) for record in self.records]


def concept_text(record: Record) -> str:
    """What stands for a concept in the gallery of texts: ``"<label>, <tag>, ..."``, without a style."""
    return ", ".join([record.label, *(tag for tag in record.tags if tag != record.label)])


def hash_order(pictures: PictureSet, indices: Sequence[int], salt: str) -> list[int]:
    """Positions in the order of a hash of code and style."""
    records = pictures.records
    return sorted(indices, key=lambda i: unit_hash(f"{salt}:{records[i].hexcode}:{records[i].style}"))


def measured_indices(pictures: PictureSet, name: Split) -> list[int]:
    """Positions of a split's pictures in the styles that are measured: those of training-only sets are left out."""
    return [i for i in pictures.indices(name) if not pictures.records[i].training_only]


def without_twins(pictures: PictureSet, name: Split) -> list[int]:
    """Positions of a test set's pictures: those measured that have no twin in training, as "woman swimming" is nearly
    the "man swimming" of the same style."""
    trained = {_drawing(pictures.records[i]) for i in measured_indices(pictures, "train")}
    return [i for i in measured_indices(pictures, name) if _drawing(pictures.records[i]) not in trained]


def held_out_set(pictures: PictureSet, name: Split, limit: int = LARGEST_SET, skip: int = 0) -> HeldOutSet:
    """``limit`` pictures of a split in hash order, after the first ``skip``.

    A test set leaves out what has a twin in training.

    Raises:
        ValueError: the split has fewer than two concepts within the limit.
    """
    chosen = without_twins(pictures, name) if name in TEST_SETS else measured_indices(pictures, name)
    indices = hash_order(pictures, chosen, "test")[skip : skip + limit]
    records = tuple(pictures.records[i] for i in indices)
    text_of = {record.base_hexcode: concept_text(record) for record in records}
    concepts = tuple(sorted(text_of))
    if len(concepts) < 2:
        raise ValueError(
            f"the set {name!r} has {len(concepts)} concept(s) within --limit {limit} after --skip {skip}: "
            "raise the limit or skip fewer"
        )
    column = {concept: index for index, concept in enumerate(concepts)}
    return HeldOutSet(
        name=name,
        indices=tuple(indices),
        records=records,
        concepts=concepts,
        texts=tuple(text_of[concept] for concept in concepts),
        targets=tuple(column[record.base_hexcode] for record in records),
    )


def _drawing(record: Record) -> tuple[str, str]:
    return twin_of(record.base_hexcode), style_family(record.style)


def same_style_mix(pictures: PictureSet, test: HeldOutSet) -> list[int]:
    """As many training pictures, of the same styles, in hash order: the other side of the real-against-real floor."""
    wanted = Counter(record.style for record in test.records)
    measured = set(test.indices)
    train = [i for i in measured_indices(pictures, "train") if i not in measured]
    chosen: list[int] = []
    for style, count in sorted(wanted.items()):
        of_style = [i for i in train if pictures.records[i].style == style]
        chosen += hash_order(pictures, of_style, "floor")[:count]
    return chosen


def other_style_pictures(pictures: PictureSet, test: HeldOutSet) -> list[int | None]:
    """For each test picture, a real picture of its concept by another style family, None where there is none.

    What a model that could copy another family's drawing, and nothing else, would answer.
    """
    by_concept: dict[str, list[int]] = {}
    for i, record in enumerate(pictures.records):
        if not record.training_only:
            by_concept.setdefault(record.base_hexcode, []).append(i)
    found: list[int | None] = []
    for record in test.records:
        family = style_family(record.style)
        others = [i for i in by_concept[record.base_hexcode] if style_family(pictures.records[i].style) != family]
        found.append(hash_order(pictures, others, f"other:{record.style}")[0] if others else None)
    return found


def composites(pictures: PictureSet, indices: Sequence[int], batch: int = 64) -> Iterator[NDArray[np.uint8]]:
    """The pictures over white, (B, side, side, 3) uint8 at a time."""
    for start in range(0, len(indices), batch):
        yield np.stack([pictures.composite(i) for i in indices[start : start + batch]])
