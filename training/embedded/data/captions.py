"""Captions: what is drawn, in which style, on which ground."""

from __future__ import annotations

import random
from collections.abc import Sequence

WHITE = "white"
GROUNDS: dict[str, tuple[int, int, int]] = {
    WHITE: (255, 255, 255),
    "red": (214, 64, 64),
    "orange": (240, 150, 60),
    "yellow": (250, 222, 110),
    "green": (96, 176, 100),
    "blue": (84, 132, 220),
    "purple": (150, 100, 200),
    "pink": (246, 176, 200),
    "grey": (170, 170, 170),
    "black": (24, 24, 24),
}
"""Ground colours by the word that captions use, 8-bit RGB. White grounds are not mentioned."""

TAG_SHARE, ONLY_TAGS_SHARE, STYLE_SHARE = 0.35, 0.06, 0.9


def compose_caption(
    label: str, style: str, tags: Sequence[str] = (), rng: random.Random | None = None, ground: str = WHITE
) -> str:
    """``"<label>, <style> style"``, or a random variant of it.

    Args:
        rng: draws tags (a third of the captions name one or two, a few consist of two tags alone) and drops the style
            from a tenth; None for the plain caption.
        ground: a key of :data:`GROUNDS`; any but white adds ``", on a <ground> background"``.

    Raises:
        ValueError: unknown ground.
    """
    if ground not in GROUNDS:
        raise ValueError(f"ground {ground!r} is none of {', '.join(GROUNDS)}")
    text, with_style = label, True
    if rng is not None:
        draw = rng.random()
        if tags and draw < TAG_SHARE:
            chosen = [tag for tag in rng.sample(list(tags), min(rng.choice((1, 1, 2)), len(tags))) if tag != label]
            text = ", ".join([label, *chosen])
        elif len(tags) >= 2 and draw < TAG_SHARE + ONLY_TAGS_SHARE:
            text = ", ".join(rng.sample(list(tags), 2))
        with_style = rng.random() < STYLE_SHARE
    if with_style:
        text += f", {style} style"
    if ground != WHITE:
        text += f", on a {ground} background"
    return text
