"""The noise intensities with which published samplers move between two steps at one side.

Each of them is the step `alpha' x0_hat + sigma' (a eps_hat + sqrt(1 - a^2) z)` with its own `a`, one a transition.
Times are timesteps (`1000 t`); `s = sigma / alpha` of the family's schedule.

- `deterministic`: Euler, DDIM with eta = 0. `a = 1`.
- `fresh`: LCM, DMD2, Wan's step-distilled students. `a = 0`.
- `mixed`: RMD's public reference implementation mixes the prediction's noise and fresh noise at every step: `a = eta`.
- `ancestral`: Euler ancestral (SDXL-Turbo). The move of `s` to `s'` goes down to `s'^2 / s` and adds noise of variance
  `s'^2 - s'^4 / s^2`, so `a = s' / s`.
- `tcd`: trajectory consistency distillation (arXiv 2402.19159) goes down to `floor((1 - eta) t')` and adds noise up to
  `t'`, so `a = s(floor((1 - eta) t')) / s(t')`. `eta = 0` is deterministic.
- `ddim`: DDIM's stochastic step (arXiv 2010.02502, eq. 16): `a = sqrt(1 - std^2 / sigma'^2)` with
  `std = eta (sigma' / sigma) sqrt(1 - alpha^2 / alpha'^2)`. `eta = 0` is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rmd.noise_schedule import NoiseSchedule

Rule = Callable[["NoiseSchedule", float, float, float], float]
"""(schedule, timestep, next timestep, eta) -> `a`."""


def _ratio(schedule: NoiseSchedule, timestep: float) -> float:
    return schedule.sigma(timestep / 1000) / schedule.alpha(timestep / 1000)


def _ancestral(schedule: NoiseSchedule, timestep: float, following: float, _eta: float) -> float:
    # At t = 1 of a flow alpha is zero: nothing of the prediction's noise is kept.
    return 0.0 if schedule.alpha(timestep / 1000) == 0 else _ratio(schedule, following) / _ratio(schedule, timestep)


def _tcd(schedule: NoiseSchedule, _timestep: float, following: float, eta: float) -> float:
    return _ratio(schedule, math.floor((1 - eta) * following)) / _ratio(schedule, following)


def _ddim(schedule: NoiseSchedule, timestep: float, following: float, eta: float) -> float:
    now, then = timestep / 1000, following / 1000
    share = eta**2 * (1 - (schedule.alpha(now) / schedule.alpha(then)) ** 2) / schedule.sigma(now) ** 2
    return math.sqrt(max(1 - share, 0.0))


NOISE_RULES: Mapping[str, Rule] = {
    "deterministic": lambda _schedule, _timestep, _following, _eta: 1.0,
    "fresh": lambda _schedule, _timestep, _following, _eta: 0.0,
    "mixed": lambda _schedule, _timestep, _following, eta: eta,
    "ancestral": _ancestral,
    "tcd": _tcd,
    "ddim": _ddim,
}


def step_noise_intensities(
    rule: str, schedule: NoiseSchedule, timesteps: Sequence[float], eta: float = 0.0
) -> float | tuple[float, ...]:
    """`Cascade.step_noise_intensity` of a published sampler: one number where all transitions have the same, else each.

    Args:
        rule: a key of `NOISE_RULES`.
        timesteps: of the steps, decreasing.
        eta: of `mixed`, `tcd` and `ddim`, in [0, 1].

    Raises:
        ValueError: an unknown rule, or an eta outside [0, 1].
    """
    if rule not in NOISE_RULES:
        raise ValueError(f"noise rule {rule!r} is not one of {', '.join(NOISE_RULES)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, not {eta}")
    values = tuple(NOISE_RULES[rule](schedule, now, then, eta) for now, then in pairwise(timesteps))
    if not values:
        return 1.0
    return values[0] if len(set(values)) == 1 else values
