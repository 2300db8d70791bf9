"""Where `tau`, the time of the noised sample that the two scores see, is drawn for each step of a cascade."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rmd.cascade import INTERVAL_CLIP, Cascade
from rmd.noise_schedule import NoiseSchedule
from rmd.timesteps import shift_time

TABLE = 1000
_TOP = 980
_LARGEST_GAP = 5
"""Entries by which a cascade's step may lie off the uniform table that `trajectory` is defined on."""


def tau_intervals(cascade: Cascade, interval: str, offsets: Sequence[float] | None = None) -> Tensor:
    """(steps, 2) float64: from where to where `tau` is drawn for each step, on the teacher's axis.

    "stage": the stage's interval; the stages' intervals are disjoint. "step": from the next step's teacher time to the
    step's own (TDM). "full": everywhere. These are clipped to [0.02, 0.98]. "trajectory": from the step's end up to the
    top of its stage, see :func:`trajectory_entries`.

    Args:
        offsets: of "trajectory", one a stage; none when left out.

    Raises:
        ValueError: an unknown interval, nothing left of one, or a cascade that "trajectory" is not defined for.
    """
    lowest, highest = INTERVAL_CLIP
    if interval == "trajectory":
        bounds = trajectory_entries(cascade, offsets)
        pairs = [(_entry_time(low, cascade), _entry_time(high, cascade)) for _, low, high in bounds]
    elif interval == "full":
        pairs = [(lowest, highest)] * cascade.num_steps
    elif interval == "stage":
        pairs = [cascade.stages[step.stage].teacher_interval for step in cascade.steps]
    elif interval == "step":
        edges = [step.teacher_timestep / 1000 for step in cascade.steps] + [0.0]
        pairs = [(max(low, lowest), min(high, highest)) for high, low in pairwise(edges)]
    else:
        raise ValueError(f"interval {interval!r} is not one of stage, step, full, trajectory")
    for index, (low, high) in enumerate(pairs):
        if not low < high:
            raise ValueError(f"step {index}: nothing is left of its interval ({low}, {high}) inside {INTERVAL_CLIP}")
    return torch.tensor(pairs, dtype=torch.float64)


def trajectory_entries(cascade: Cascade, offsets: Sequence[float] | None = None) -> list[tuple[int, int, int]]:
    """Each step's (end, lowest, end of range) as entries of the 1000-entry table, as the public reference has them.

    Entry `i` is the time `(i + 1) / 1000` under the cascade's flow shift. Step `j` of `K`, counted from the noise, goes
    from entry `1000 (K - j) // K - 1` down to its end, `1000 // K - 1` below. `tau` lies between that end, plus an
    offset (a share of the way up), and the stage's top: 980, or in a later stage the last entry of the one before.

    Raises:
        ValueError: the steps are not uniform before the flow shift, or the offsets are not one a stage.
    """
    num_steps = cascade.num_steps
    if offsets is not None and len(offsets) != len(cascade.stages):
        raise ValueError(
            f"interval_offsets has {len(offsets)} values, but the cascade has {len(cascade.stages)} stages"
        )
    entries = [TABLE * (num_steps - index) // num_steps - 1 for index in range(num_steps)]
    for step, entry in zip(cascade.steps, entries, strict=True):
        own = shift_time(step.teacher_timestep / 1000, 1 / cascade.flow_shift) * TABLE - 1
        if abs(own - entry) > _LARGEST_GAP:
            raise ValueError(
                f"interval=trajectory is for steps that are uniform before the flow shift; the one at "
                f"{step.teacher_timestep:g} lies at entry {own:.0f} of the table, not at {entry}"
            )
    bounds = []
    for index, step in enumerate(cascade.steps):
        end = entries[index] - TABLE // num_steps + 1
        first = next(i for i, other in enumerate(cascade.steps) if other.stage == step.stage)
        top = entries[first - 1] if step.stage else _TOP
        offset = 0.0 if offsets is None else offsets[step.stage]
        bounds.append((end, end + int((top - end) * offset), top))
    return bounds


def step_ends(cascade: Cascade) -> Tensor:
    """(steps,) float64: the time that each step ends at, on the table of :func:`trajectory_entries`."""
    return torch.tensor([_entry_time(end, cascade) for end, _, _ in trajectory_entries(cascade)], dtype=torch.float64)


def _entry_time(entry: int, cascade: Cascade) -> float:
    return shift_time((entry + 1) / TABLE, cascade.flow_shift)


def draw_times(low: Tensor, high: Tensor, share: Tensor, flow_shift: float = 1.0) -> Tensor:
    """Times between `low` and `high`, (B,) float64 each: uniform before the flow shift.

    Args:
        share: (B,), uniform in [0, 1).
        flow_shift: 1 draws uniformly in time itself.
    """
    if flow_shift == 1.0:
        return low + (high - low) * share
    bottom, top = (t / (flow_shift - (flow_shift - 1) * t) for t in (low, high))
    u = bottom + (top - bottom) * share
    return flow_shift * u / (1 + (flow_shift - 1) * u)


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
