"""Timesteps: the teacher's steps, the resolution map of Eq. 2 and the stage cut by logSNR.

All times are in [0, 1]. A timestep is `1000 t`: an integer in every cascade of ours, not always in public students'.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rmd.noise_schedule import NoiseSchedule


RESOLUTION_MAPS = ("shift", "logsnr", "none", "inverse")


def shift_time(t: float, scale: float) -> float:
    """`s t / (1 + (s - 1) t)`: a flow shift, and Eq. 2 on rectified flow with `s = R / r`."""
    return scale * t / (1 + (scale - 1) * t)


def uniform_teacher_timesteps(num_steps: int, flow_shift: float = 1.0) -> tuple[int, ...]:
    """`num_steps` teacher steps, uniform from 1000 down to (without) 0, under the model's flow shift, as integers.

    Raises:
        ValueError: fewer than 1 step, or so many that two round to the same integer.
    """
    if num_steps < 1:
        raise ValueError(f"the number of steps must be at least 1, not {num_steps}")
    steps = tuple(round(1000 * shift_time(1 - k / num_steps, flow_shift)) for k in range(num_steps))
    if len(set(steps)) != num_steps:
        raise ValueError(f"{num_steps} steps under flow shift {flow_shift} do not fit whole timesteps; use fewer")
    return steps


def tabled_teacher_timesteps(num_steps: int, flow_shift: float, sigma_min: float = 0.003 / 1.002) -> tuple[int, ...]:
    """Wan's teacher steps: entries `int(999 k / n)` of a 1000-entry table from 1 to `sigma_min`, shifted and rounded.

    Six steps under shift 5 are the printed 1000, 962, 909, 834, 716, 505.
    """
    entries = (int(999 * k / num_steps) for k in range(num_steps))
    return tuple(round(1000 * shift_time(1 - (1 - sigma_min) * entry / 999, flow_shift)) for entry in entries)


def reference_timesteps(num_steps: int, flow_shift: float) -> tuple[float, ...]:
    """The steps of RMD's public reference implementation: from entry 999 of its table down by `1000 // n` entries.

    Entry `i` is the time `(i + 1) / 1000` under the flow shift. Six steps under shift 3 are 1000, 937.8, 857.9, 751.5,
    602.9, 380.6.
    """
    entries = (999 - k * (1000 // num_steps) for k in range(num_steps))
    return tuple(1000 * shift_time((entry + 1) / 1000, flow_shift) for entry in entries)


def euler_timesteps(num_steps: int, flow_shift: float) -> tuple[float, ...]:
    """The timesteps that diffusers' `FlowMatchEulerDiscreteScheduler(shift).set_timesteps(n)` gives, in float64.

    Evenly spaced between the shifted ends of its table (1 and 1/1000), and then shifted once more: the last step of few
    is nearly clean (9 under shift 3).
    """
    low = shift_time(1 / 1000, flow_shift)
    spaced = (1 - (1 - low) * k / max(num_steps - 1, 1) for k in range(num_steps))
    return tuple(1000 * shift_time(t, flow_shift) for t in spaced)


def map_timestep(
    teacher_timestep: float, scale: float, resolution_map: str, schedule: NoiseSchedule | None = None
) -> float:
    """The timestep that the network sees at a side `scale = R / r` times smaller than the teacher's (Eq. 2).

    The teacher's timestep is already an integer: rounding it first is what gives the printed schedules.

    Args:
        teacher_timestep: 0 to 1000; 1000 (pure noise) maps to itself. What is mapped comes back as an integer.
        scale: `R / r`; 1 maps to itself.
        resolution_map: "shift" (the paper's formula on `t / 1000`, for every family), "logsnr" (the exact
            `logSNR(t) - 2 ln s` through the family's own schedule; equal to "shift" on rectified flow), "none", or
            "inverse" (`t / (s - (s - 1) t)`, SD3's own direction).
        schedule: needed by "logsnr" only.

    Raises:
        ValueError: an unknown map, or "logsnr" without a schedule.
    """
    if resolution_map not in RESOLUTION_MAPS:
        raise ValueError(f"resolution_map {resolution_map!r} is not one of {', '.join(RESOLUTION_MAPS)}")
    if resolution_map == "none" or teacher_timestep >= 1000 or scale == 1:
        return teacher_timestep
    t = teacher_timestep / 1000
    if resolution_map == "shift":
        mapped = shift_time(t, scale)
    elif resolution_map == "inverse":
        mapped = t / (scale - (scale - 1) * t)
    elif schedule is None:
        raise ValueError('resolution_map "logsnr" needs the backbone\'s noise schedule')
    else:
        mapped = schedule.time_from_log_snr(schedule.log_snr(t) - 2 * math.log(scale))
    return round(1000 * mapped)


def cut_log_snr(schedule: NoiseSchedule, timestep: int) -> float:
    """The logSNR that the stage cut compares: the backbone's own, with timestep 1000 as minus infinity."""
    return -math.inf if timestep >= 1000 else schedule.log_snr(timestep / 1000)


def assign_stages(
    schedule: NoiseSchedule, teacher_timesteps: Sequence[int], thresholds: Sequence[float]
) -> tuple[int, ...]:
    """The stage of each step: a step is below a threshold while its own logSNR is.

    Raises:
        ValueError: thresholds that do not increase, or that leave a stage without steps.
    """
    if any(b <= a for a, b in pairwise(thresholds)):
        raise ValueError(f"thresholds {list(thresholds)} must increase strictly")
    values = [cut_log_snr(schedule, timestep) for timestep in teacher_timesteps]
    stages = tuple(bisect_right(thresholds, value) for value in values)
    for stage in range(len(thresholds) + 1):
        if stage not in stages:
            shown = ", ".join("-inf" if math.isinf(v) else f"{v:.2f}" for v in values)
            raise ValueError(
                f"thresholds {list(thresholds)} leave stage {stage} without a step; the steps' logSNRs are {shown}"
            )
    return stages


def thresholds_for_counts(
    schedule: NoiseSchedule, teacher_timesteps: Sequence[int], counts: Sequence[int]
) -> tuple[float, ...]:
    """Thresholds that split the steps into stages of the given counts: midway between the neighbours' logSNRs."""
    values = [cut_log_snr(schedule, timestep) for timestep in teacher_timesteps]
    thresholds: list[float] = []
    end = 0
    for count in counts[:-1]:
        end += count
        below, above = values[end - 1], values[end]
        thresholds.append(above - 1.0 if math.isinf(below) else (below + above) / 2)
    return tuple(thresholds)
