"""Notices a student that falls apart: last-step predictions that turn to noise, one colour, a cast or a still.

What counts as such is relative to the run's own beginning, when the last step still has the teacher's weights. The
limits are wide: they are for runs that nobody would keep. The shipped students' last steps (8 pictures, 3 films) have
1.4 and 1.6 times the spread that their teachers' weights have there, 1.6 and 1.5 times the roughness (.45 and .44).
Figures are :func:`training.distill.figures.latent_figures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BEGINNING = 20
"""Observations of the last step that make the run's beginning, and as many again before anything is judged."""
MEMORY = 0.9
SPREAD_FACTOR = 3.0
CAST = 1.5
"""A cast is channel means further out than the beginning's by so many spreads."""
NOISE_ROUGHNESS = 0.95
NOISE_FACTOR = 1.5
STILL_FACTOR = 0.2
_NAMES = ("mean", "spread", "roughness", "change")


class DriftWatch:
    """Follows one step's figures, smoothed.

    Args:
        step: index of the step whose predictions are the student's results.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.count = 0
        self.beginning: dict[str, float] = {}
        self.present: dict[str, float] = {}

    def observe(self, figures: Mapping[str, float]) -> str | None:
        """Take an update's figures; returns what is wrong, if something is."""
        own = {name: figures.get(f"latent_{name}_step_{self.step}") for name in _NAMES}
        seen = {name: value for name, value in own.items() if value is not None}
        if not seen:
            return None
        self.count += 1
        for name, value in seen.items():
            if self.count <= BEGINNING:
                before = self.beginning.get(name, 0.0)
                self.beginning[name] = before + (value - before) / self.count
            self.present[name] = MEMORY * self.present.get(name, value) + (1 - MEMORY) * value
        return self._verdict() if self.count > 2 * BEGINNING else None

    def _verdict(self) -> str | None:
        start, now = self.beginning, self.present
        still = "change" in now and now["change"] < STILL_FACTOR * start["change"]
        wrong = {
            "noise": ("roughness", now["roughness"] > max(NOISE_ROUGHNESS, NOISE_FACTOR * start["roughness"])),
            "one colour": ("spread", now["spread"] < start["spread"] / SPREAD_FACTOR),
            "extremes": ("spread", now["spread"] > start["spread"] * SPREAD_FACTOR),
            "a colour cast": ("mean", now["mean"] > start["mean"] + CAST * start["spread"]),
            "a still": ("change", still),
        }
        for what, (name, fails) in wrong.items():
            if fails:
                return (
                    f"the student's predictions turn to {what}: {name} {now[name]:.3g}, {start[name]:.3g} at the start"
                )
        return None

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON-ready."""
        return {"count": self.count, "beginning": self.beginning, "present": self.present}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave; an empty one begins anew."""
        self.count = int(state.get("count", 0))
        self.beginning, self.present = dict(state.get("beginning", {})), dict(state.get("present", {}))
