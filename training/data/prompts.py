"""The embedded student's prompts: captions of training pictures, and compositions that no picture shows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from training.data.captions import GROUNDS, WHITE, compose_caption
from training.data.dataset import PictureSet, Record, caption
from training.data.sources import DEFAULT_PACKAGES
from training.data.split import held_drawings, may_train, style_family

PLAIN_WEIGHT = 3
"""How often a picture's plain caption is drawn for each of its random variants."""
_NEAR = {package.style: package.near for package in DEFAULT_PACKAGES if package.training_only}


def training_prompts(data: Path, seed: int = 0, composed_share: float = 0.0) -> list[str]:
    """Captions and compositions of a picture cache, repeated by how often each is to be drawn.

    Args:
        data: folder that `rmd data` wrote.
        composed_share: share of compositions among all, 0 <= share < 1.

    Raises:
        FileNotFoundError: the folder holds no finished cache.
        ValueError: compositions are wanted, and every training concept has a picture in every style.
    """
    records = PictureSet.load(data).records
    captions = caption_prompts(records, seed)
    if not composed_share:
        return captions
    composed = composed_prompts(records, seed)
    if not composed:
        raise ValueError(f"{data} leaves nothing to compose: set composed_share to 0")
    count = round(len(captions) * composed_share / (1 - composed_share))
    whole, rest = divmod(count, len(composed))
    return captions + composed * whole + random.Random(seed).sample(composed, rest)


def caption_prompts(records: Sequence[Record], seed: int = 0, variants: int = 2) -> list[str]:
    """Captions of the training pictures, none of the held-out ones; repeated by how often each is to be drawn.

    A picture gives its plain caption `PLAIN_WEIGHT` times, `variants` random ones and one on a coloured ground.
    """
    rng = random.Random(seed)
    coloured = [ground for ground in GROUNDS if ground != WHITE]
    prompts: list[str] = []
    for record in (record for record in records if record.split == "train"):
        prompts += [caption(record)] * PLAIN_WEIGHT
        prompts += [caption(record, rng) for _ in range(variants)]
        prompts.append(caption(record, rng, rng.choice(coloured)))
    return prompts


def composed_prompts(records: Sequence[Record], seed: int = 0) -> list[str]:
    """What training pictures name but none of them shows: concepts in further styles, and their tags alone.

    A distillation needs no pictures, so its student can be taught how the teacher composes what it has not seen, which
    is what most users ask of it. Each training concept gives its label in every style that it has no picture in, and one
    of its tags, and two of them, in every measured style. Test sets stay unseen: what may not be trained on as a picture
    (`may_train`: twins and like styles included), and what reads like a held-out picture, is left out.
    """
    rng = random.Random(seed)
    shown = {(record.base_hexcode, record.style) for record in records}
    held = held_drawings({(r.base_hexcode, r.style): r.split for r in records if not r.training_only})
    held_texts = {record.label for record in records if record.split == "unseen_concept"}
    held_captions = {caption(record) for record in records if record.split != "train"}
    near = {r.style: _NEAR.get(r.style, "") if r.training_only else style_family(r.style) for r in records}
    measured = {record.style for record in records if not record.training_only}

    def free(name: str, style: str) -> bool:
        return name not in held_texts and compose_caption(name, style) not in held_captions

    # One record a concept: skin tones and styles share label and tags.
    concepts = {r.base_hexcode: r for r in records if r.split == "train" and r.hexcode == r.base_hexcode}
    prompts: list[str] = []
    for concept, record in sorted(concepts.items()):
        for style in sorted(near):
            if not may_train(concept, near[style], held):
                continue
            names = [record.label] if (concept, style) not in shown else []
            if style in measured:
                tags = [tag for tag in record.tags if free(tag, style)]
                names += [", ".join(rng.sample(tags, count)) for count in (1, 2) if len(tags) >= count]
            prompts += [compose_caption(name, style) for name in names if free(name, style)]
    return list(dict.fromkeys(prompts))
