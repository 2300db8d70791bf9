"""Where a build stands, for whoever watches it; torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class BuildProgress:
    """Where a build stands.

    Attributes:
        done: engines built so far.
        total: engines to build.
        current: what was finished last, or is under way.
        elapsed: seconds so far.
        remaining: estimated seconds left, None before the first engine is done.
    """

    done: int
    total: int
    current: str
    elapsed: float
    remaining: float | None


Report = Callable[[BuildProgress], None]
