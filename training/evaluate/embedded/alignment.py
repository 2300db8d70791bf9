"""Text alignment: does the picture show what the prompt says, judged by networks that training never saw.

A ridge regression from picture features (EfficientNet-Lite0) to text features (MiniLM) is fitted on training concepts
only. A picture is projected, and the distinct concepts of a test set are ranked by the cosine to their text features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.embedded.data.split import unit_hash
from training.evaluate.shared.metrics import ranks_of_target, recall_at, unit_rows

PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
HELD_SHARE = 0.15


@dataclass(frozen=True)
class Projection:
    """``(f - picture_mean) / picture_scale @ weight``: picture features to centred text features.

    Attributes:
        picture_mean, picture_scale: (P,).
        text_mean: (T,).
        weight: (P, T).
        penalty: the ridge penalty, chosen on held-out training concepts.
    """

    picture_mean: Tensor
    picture_scale: Tensor
    text_mean: Tensor
    weight: Tensor
    penalty: float

    def pictures(self, features: Tensor) -> Tensor:
        """(N, P) picture features -> (N, T), comparable with :meth:`texts` by cosine."""
        return (features.double() - self.picture_mean) / self.picture_scale @ self.weight

    def texts(self, features: Tensor) -> Tensor:
        """(G, T) text features, centred on the training concepts'."""
        return features.double() - self.text_mean

    def scores(self, pictures: Tensor, texts: Tensor) -> Tensor:
        """(N, G) cosines of picture features (N, P) and text features (G, T)."""
        return unit_rows(self.pictures(pictures)) @ unit_rows(self.texts(texts)).T


def _fit(pictures: Tensor, texts: Tensor, penalties: Sequence[float]) -> list[Projection]:
    pictures, texts = pictures.double(), texts.double()
    mean, scale, text_mean = pictures.mean(0), pictures.std(0).clamp(min=1e-3), texts.mean(0)
    x, y = (pictures - mean) / scale, texts - text_mean
    # X^T (X X^T + p)^-1 Y = (X^T X + p)^-1 X^T Y: the smaller of the two matrices is decomposed, once for all.
    by_rows = x.shape[0] < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if by_rows else x.T @ x)
    projected = vectors.T @ (y if by_rows else x.T @ y)
    found: list[Projection] = []
    for penalty in penalties:
        solved = vectors @ (projected / (values + penalty).clamp(min=1e-9)[:, None])
        found.append(Projection(mean, scale, text_mean, x.T @ solved if by_rows else solved, penalty))
    return found


def fit_projection(
    pictures: Tensor, texts: Tensor, concepts: Sequence[str], penalties: Sequence[float] = PENALTIES
) -> Projection:
    """The ridge regression from picture to text features.

    The penalty is the one with the best recall at 5 on a hash-drawn part of the training concepts; the regression is
    then fitted again on all of them.

    Args:
        pictures: (N, P) features of training pictures.
        texts: (N, T) text features of the same rows' concepts.
        concepts: N concept codes; rows of one concept are held out together.

    Raises:
        ValueError: lengths differ, or there are fewer than two concepts.
    """
    if not len(pictures) == len(texts) == len(concepts):
        raise ValueError(f"{len(pictures)} pictures, {len(texts)} texts and {len(concepts)} concepts do not match")
    if len(set(concepts)) < 2:
        raise ValueError("text alignment needs training pictures of at least 2 concepts; build the picture cache again")
    held = torch.tensor([unit_hash(f"alignment:{concept}") < HELD_SHARE for concept in concepts])
    penalty = float(penalties[len(penalties) // 2])
    if len({c for c, h in zip(concepts, held.tolist(), strict=True) if h}) > 1 and bool((~held).any()):
        names = sorted({c for c, h in zip(concepts, held.tolist(), strict=True) if h})
        column = {name: index for index, name in enumerate(names)}
        rows = held.nonzero().flatten().tolist()
        targets = [column[concepts[row]] for row in rows]
        gallery = torch.stack([texts[rows[targets.index(index)]] for index in range(len(names))])
        candidates = _fit(pictures[~held], texts[~held], penalties)
        penalty = max(
            candidates, key=lambda p: recall_at(5, ranks_of_target(p.scores(pictures[held], gallery), targets))
        ).penalty
    return _fit(pictures, texts, [penalty])[0]


def text_features(
    texts: Sequence[str], encode: Callable[[Sequence[str]], Tensor], batch: int = 256
) -> tuple[Tensor, dict[str, int]]:
    """Pooled text features of the distinct texts.

    Args:
        encode: texts -> (n, T), such as a backbone's pooled condition.

    Returns:
        (D, T) float32, and each text's row.
    """
    distinct = sorted(set(texts))
    parts = [encode(distinct[start : start + batch]).float() for start in range(0, len(distinct), batch)]
    return torch.cat(parts), {text: row for row, text in enumerate(distinct)}
