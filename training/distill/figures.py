"""What an update shows of itself: the student's predictions and gradients by step, the scores' difference by time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from training.distill.methods.base import Matched
    from training.distill.rollout import Prediction

TIME_BINS = 5


def step_figures(predictions: Sequence[Prediction], matched: Sequence[Matched], samples: int) -> dict[str, float]:
    """Figures of the steps in a batch, after its backward pass; see :func:`latent_figures`.

    `gradient_step_K` is the mean norm of a sample's own loss with respect to its x0 prediction.

    Args:
        samples: over which the differentiated loss was a mean.
    """
    figures: dict[str, Tensor] = {}

    for p in predictions:
        if p.x0.grad is None:
            continue
        norms = p.x0.grad.flatten(1).norm(dim=1) * samples
        for step, at in _places(p.steps):
            figures[f"gradient_step_{step}"] = norms[at].mean()
    for m in matched:
        for step, at in _places(m.steps):
            own = latent_figures(m.y.detach()[at])
            figures.update({f"latent_{name}_step_{step}": value for name, value in own.items()})
    return _floats(figures)


def _places(values: Tensor) -> list[tuple[int, Tensor]]:
    return [(value, (values == value).nonzero().flatten()) for value in torch.unique(values).tolist()]


def _floats(figures: dict[str, Tensor]) -> dict[str, float]:
    """All at once: each would be a wait for the device of its own."""
    if not figures:
        return {}
    return dict(zip(figures, torch.stack([value.float() for value in figures.values()]).tolist(), strict=True))


def latent_figures(y: Tensor) -> dict[str, Tensor]:
    """How predictions (B, C, [T], H, W) look, in four numbers (three for pictures).

    - `mean`: root mean square of the channels' means. Colour casts raise it.
    - `spread`: standard deviation over the positions of a picture, averaged. One colour has none.
    - `roughness`: mean difference of horizontal neighbours over the spread. White noise has 1.13.
    - `change`: of films, mean difference of neighbouring frames over the spread. A still has none, cuts to noise 1.13.
    """
    y = y.float()
    spread = y.flatten(-2).std(-1).mean()
    least = spread.clamp(min=1e-12)
    figures = {
        "mean": y.transpose(0, 1).flatten(1).mean(1).square().mean().sqrt(),
        "spread": spread,
        "roughness": y.diff(dim=-1).abs().mean() / least,
    }
    if y.ndim == 5 and y.shape[2] > 1:
        figures["change"] = y.diff(dim=2).abs().mean() / least
    return figures


def direction_figures(d: Tensor, tau: Tensor) -> dict[str, float]:
    """Mean `|fake - real|` by fifths of the time axis: where rounding drowns the scores it grows towards noise."""
    sizes, bins = d.abs().flatten(1).mean(1), (tau.cpu() * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    return _floats({f"direction_tau_{index / TIME_BINS:g}": sizes[at].mean() for index, at in _places(bins)})
