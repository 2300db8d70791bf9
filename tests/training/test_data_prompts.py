"""Which prompts the embedded student is trained on: captions, compositions, and nothing of the test sets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from training.data import prompts as module
from training.data.captions import compose_caption
from training.data.dataset import PictureSet, Record, caption
from training.data.prompts import caption_prompts, composed_prompts, training_prompts
from training.data.split import assign_splits, held_drawings, is_unseen_concept, may_train, style_family, twin_of

MEASURED = ("fluent 3d", "noto", "twemoji")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Two hundred pairs of twins: a man in two measured styles, a woman in all three, both in a training-only set."""
    shown = {f"{code}-200d-{job:x}": MEASURED[start:] for job in range(0x2700, 0x27C8)
             for code, start in (("1f468", 1), ("1f469", 0))}  # fmt: skip
    splits = assign_splits((code, style) for code, styles in shown.items() for style in styles)
    held = held_drawings(splits)

    def record(code: str, style: str, training_only: bool = False) -> Record:
        split = splits.get((code, style), "train")
        return Record(code, code, style, f"thing {code}", (f"tag {code}", "person"), 0, split, training_only)

    blobs = [record(code, "noto blob", True) for code in shown if may_train(code, "noto", held)]
    return [record(code, style) for code, styles in shown.items() for style in styles] + blobs


def held_families(records: list[Record]) -> set[tuple[str, str]]:
    return {(twin_of(r.base_hexcode), style_family(r.style)) for r in records if r.split != "train"}


def test_a_concept_is_composed_with_every_style_it_may_be_shown_in_and_is_not(records: list[Record]) -> None:
    composed = set(composed_prompts(records))
    shown = {(r.base_hexcode, r.style) for r in records}
    held = held_families(records)
    trained = {r.base_hexcode for r in records if r.split == "train"}
    found = Counter[bool]()
    for code in {r.base_hexcode for r in records}:
        for style in (*MEASURED, "noto blob"):
            family = "noto" if style == "noto blob" else style_family(style)
            allowed = code in trained and (code, style) not in shown and (twin_of(code), family) not in held
            assert (compose_caption(f"thing {code}", style) in composed) == allowed
            found[allowed] += 1
    assert min(found.values()) > 50, "the fixture has both kinds"


def test_no_composition_reads_like_a_test_picture_or_draws_a_twin_of_one(records: list[Record]) -> None:
    composed = composed_prompts(records)
    assert not {caption(r) for r in records if r.split != "train"} & set(composed)
    held = held_families(records)
    codes = [
        (text, word.split(" ")[1])
        for text in composed
        for word in text.split(", ")
        if word.startswith(("thing", "tag"))
    ]
    assert not [text for text, code in codes if is_unseen_concept(code)]
    for text, code in codes:
        style = text.removesuffix(" style").rsplit(", ", 1)[1]
        assert style not in MEASURED or (twin_of(code), style_family(style)) not in held


def test_a_held_out_label_is_no_tag_in_any_company(records: list[Record]) -> None:
    unseen = next(r for r in records if r.split == "unseen_concept")
    pair = next(r for r in records if r.split == "unseen_pair")
    trained = next(r for r in records if r.split == "train" and r.base_hexcode != pair.base_hexcode)
    tagged = Record(**{**trained.to_dict(), "tags": (unseen.label, pair.label, "free")})
    others = [r for r in records if r.base_hexcode != trained.base_hexcode]
    for seed in range(5):
        composed = composed_prompts([*others, tagged], seed)
        assert not [text for text in composed if unseen.label in text]
        assert not [text for text in composed if pair.label in text and text.endswith(f", {pair.style} style")]
        assert [text for text in composed if text.startswith(f"{pair.label}, free") or ", " + pair.label in text]


def test_the_share_of_compositions_is_kept(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = PictureSet(records, np.zeros((len(records), 1, 1, 4), np.uint8))
    monkeypatch.setattr(module.PictureSet, "load", lambda _root: pictures)
    captions = caption_prompts(records, 3)
    for share in (0.0, 0.25, 0.8):
        prompts = training_prompts(Path("data"), 3, share)
        assert prompts[: len(captions)] == captions
        composed = Counter(prompts[len(captions) :])
        assert sum(composed.values()) / len(prompts) == pytest.approx(share, abs=1e-3)
        assert not composed or max(composed.values()) - min(composed.values()) <= 1
    monkeypatch.setattr(module, "composed_prompts", lambda *_: [])
    with pytest.raises(ValueError, match="composed_share"):
        training_prompts(Path("data"), 3, 0.5)
