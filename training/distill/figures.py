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


def step_figures(predictions: Sequence[Prediction], matched: Sequence[Matched]) -> dict[str, float]:
    """Figures of the steps in a batch, after its backward pass; see :func:`latent_figures`.

    `gradient_step_K` is the mean norm of a sample's own loss with respect to its x0 prediction.
    """
    figures: dict[str, float] = {}
    for p in predictions:
        if p.x0.grad is None:
            continue
        total = sum(len(other.steps) for other in predictions)
        norms = p.x0.grad.flatten(1).norm(dim=1).cpu() * total  # the loss is a mean over the batch
        for step in torch.unique(p.steps).tolist():
            figures[f"gradient_step_{step}"] = float(norms[p.steps == step].mean())
    for m in matched:
        for step in torch.unique(m.steps).tolist():
            own = latent_figures(m.y.detach()[m.steps == step])
            figures.update({f"latent_{name}_step_{step}": value for name, value in own.items()})
    return figures


def latent_figures(y: Tensor) -> dict[str, float]:
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
    return {name: float(value) for name, value in figures.items()}


def direction_figures(d: Tensor, tau: Tensor) -> dict[str, float]:
    """Mean `|fake - real|` by fifths of the time axis: where rounding drowns the scores it grows towards noise."""
    sizes, bins = d.abs().flatten(1).mean(1).cpu(), (tau.cpu() * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    return {
        f"direction_tau_{index / TIME_BINS:g}": float(sizes[bins == index].mean())
        for index in torch.unique(bins).tolist()
    }
