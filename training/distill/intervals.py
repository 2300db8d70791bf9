"""Where `tau`, the time of the noised sample that the two scores see, is drawn for each step of a cascade."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rmd.cascade import INTERVAL_CLIP, Cascade
from rmd.noise_schedule import NoiseSchedule


def tau_intervals(cascade: Cascade, interval: str) -> Tensor:
    """(steps, 2) float64: from where to where `tau` is drawn for each step, on the teacher's axis.

    "stage": the stage's interval; the stages' intervals are disjoint. "step": from the next step's teacher time to the
    step's own (TDM). "full": everywhere. All are clipped to [0.02, 0.98].
    """
    lowest, highest = INTERVAL_CLIP
    if interval == "full":
        pairs = [(lowest, highest)] * cascade.num_steps
    elif interval == "stage":
        pairs = [cascade.stages[step.stage].teacher_interval for step in cascade.steps]
    elif interval == "step":
        edges = [step.teacher_timestep / 1000 for step in cascade.steps] + [0.0]
        pairs = [(max(low, lowest), min(high, highest)) for high, low in pairwise(edges)]
    else:
        raise ValueError(f"interval {interval!r} is not one of stage, step, full")
    for index, (low, high) in enumerate(pairs):
        if not low < high:
            raise ValueError(f"step {index}: nothing is left of its interval ({low}, {high}) inside {INTERVAL_CLIP}")
    return torch.tensor(pairs, dtype=torch.float64)


def faded_intensity(schedule: NoiseSchedule, intensity: Tensor, end: Tensor, tau: Tensor) -> Tensor:
    """The share of predicted noise at `tau` of a sample that got `intensity` at its step's `end` and fresh noise since.

    From `alpha_end y + sigma_end (a eps + b z)` the forward process leads to `alpha_tau y + sigma_tau (a' eps + b' z)`
    with `a' = a (sigma_end / alpha_end) (alpha_tau / sigma_tau)`: it fades as noise is added.

    Args:
        intensity: (B,), `a`.
        end, tau: (B,) times, `tau` not below `end`.

    Returns:
        (B,) float64, from 0 to `a`.
    """
    ratio = schedule.sigma(end) / schedule.alpha(end) * schedule.alpha(tau) / schedule.sigma(tau)
    return intensity * ratio.to(torch.float64)
