"""Which pictures are trained on: decided by a hash of the concept's code, so that every machine draws the same line.

A *concept* is one base hexcode (an emoji without skin tones) in whatever style. Two test sets are held out:

- ``unseen_concept``: a tenth of the concepts, in all styles;
- ``unseen_pair``: a concept in one style family, known to training in at least one other family. All Fluent sets are
  one family: they are the same drawings.

Training-only sets have no part in this: they are neither counted as families nor tested, and lose what is held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal

Split = Literal["train", "unseen_pair", "unseen_concept"]

CONCEPT_SHARE = 0.10
"""Share of the concepts held out in all styles."""
PAIR_SHARE = 0.22
"""Share of the remaining concepts (of several families) that lose one family to the test set."""


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def style_family(style: str) -> str:
    """``"fluent"`` for every Fluent set, the style itself otherwise."""
    return "fluent" if style.startswith("fluent") else style


_TWIN_SIGNS = frozenset({"200d", "fe0f", "2640", "2642", "27a1"})  # joiners, gender signs, "facing right"
_PERSONS = {"1f468": "1f9d1", "1f469": "1f9d1"}  # man, woman -> person


def twin_of(base_hexcode: str) -> str:
    """What a concept shares with its twins, which look nearly alike: its code without gender and direction."""
    parts = base_hexcode.lower().split("-")
    return "-".join(_PERSONS.get(part, part) for part in parts if part not in _TWIN_SIGNS)


def is_unseen_concept(base_hexcode: str) -> bool:
    """Whether the concept is held out in all styles."""
    return unit_hash(f"concept:{base_hexcode}") < CONCEPT_SHARE


def assign_splits(pictures: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Split]:
    """The split of each picture.

    Args:
        pictures: (base hexcode, style) of every picture there is; the order does not matter.

    Returns:
        (base hexcode, style) -> split.
    """
    pictures = list(pictures)
    families: dict[str, set[str]] = {}
    for hexcode, style in pictures:
        families.setdefault(hexcode, set()).add(style_family(style))
    held_family: dict[str, str] = {}
    for hexcode, known in families.items():
        if len(known) > 1 and unit_hash(f"pair:{hexcode}") < PAIR_SHARE:
            choices = sorted(known)
            held_family[hexcode] = choices[int(unit_hash(f"style:{hexcode}") * len(choices))]

    def split_of(hexcode: str, style: str) -> Split:
        if is_unseen_concept(hexcode):
            return "unseen_concept"
        return "unseen_pair" if held_family.get(hexcode) == style_family(style) else "train"

    return {(hexcode, style): split_of(hexcode, style) for hexcode, style in pictures}


def held_drawings(splits: Mapping[tuple[str, str], Split]) -> set[tuple[str, str]]:
    """(twin code, style family) of every test picture: what a set near that family must not show."""
    return {(twin_of(hexcode), style_family(style)) for (hexcode, style), split in splits.items() if split != "train"}


def may_train(base_hexcode: str, near: str, held: set[tuple[str, str]]) -> bool:
    """Whether a training-only picture may be trained on.

    Args:
        near: the style family that its set resembles, empty where there is none.
        held: of the tested sets, from :func:`held_drawings`.
    """
    return not is_unseen_concept(base_hexcode) and (twin_of(base_hexcode), near) not in held
