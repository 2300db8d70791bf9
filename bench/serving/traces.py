"""Seeded request traces: who asks for what, and when. The same for every policy that is measured with them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from server.core.card import TEACHER_SCHEDULE
from server.core.work import Work

_BURST, _PERIOD = 2.0, 10.0  # seconds: a burst at five times the mean rate, then silence
_GAMMA_CV = 3.0
_RAMP_END = 1.5  # times the nominal rate, where the ramp ends; it begins at nothing


@dataclass(frozen=True)
class Ask:
    """One request of a trace.

    Attributes:
        at: seconds from the trace's start when it is meant to be sent.
        partial_images: shown on the way; 0 where the reply is not streamed.
    """

    at: float
    schedule: str
    seed: int
    pictures: int = 1
    partial_images: int = 0
    account: str = ""

    @property
    def kind(self) -> str:
        """What it is compared with: requests of one kind cost the same alone."""
        count = f" x{self.pictures}" if self.pictures > 1 else ""
        return f"{self.schedule}{count}" + (" streamed" if self.partial_images else "")

    @property
    def prompt(self) -> str:
        """What is asked for: no other request's text, so that a server that keeps encoded texts gains nothing."""
        return f"{THINGS[self.seed % len(THINGS)]} {self.seed}"

    def work(self, name: str, arrived: float, deadline: float = math.inf) -> Work:
        """Return it as a scheduler takes it."""
        return Work(
            id=name,
            prompt=self.prompt,
            schedule=self.schedule,
            seeds=tuple(self.seed + index for index in range(self.pictures)),
            partial_images=self.partial_images,
            account=self.account,
            arrived=arrived,
            deadline=deadline,
        )


@dataclass(frozen=True)
class Mix:
    """What is asked for.

    Attributes:
        schedules: each one's share of requests; the shares add up to 1.
        four: share of requests for four pictures.
        streamed: share of requests that are streamed with one partial picture.
    """

    schedules: Mapping[str, float] = field(default_factory=lambda: {"2+2": 1.0})
    four: float = 0.0
    streamed: float = 0.0

    @property
    def pictures(self) -> float:
        """Pictures a request, on average."""
        return 1.0 + 3.0 * self.four


_THREE = {"2+2": 0.6, "1+3": 0.2, "0+4": 0.2}
MIXES: Mapping[str, Mix] = {
    "2+2": Mix(),
    "mix": Mix(_THREE),
    "teachers": Mix({name: share * 0.97 for name, share in _THREE.items()} | {TEACHER_SCHEDULE: 0.03}),
    "four": Mix(_THREE, four=0.3),
    "streamed": Mix(_THREE, streamed=0.5),
}
"""``mix`` is 60/20/20 of three schedules; ``teachers`` the same with 3 % of the teacher's."""

THINGS = tuple(
    f"{colour} {thing}, {style} style, number"
    for style in ("noto", "twemoji")
    for thing in ("apple", "cat", "house", "rocket", "tree", "umbrella", "fish", "clock")
    for colour in ("red", "blue", "green", "yellow")
)


def _poisson(units: Sequence[float], rate: float) -> list[float]:
    return [unit / rate for unit in units]


def _bursts(units: Sequence[float], rate: float) -> list[float]:
    per_period = rate * _PERIOD
    return [unit // per_period * _PERIOD + unit % per_period / per_period * _BURST for unit in units]


def _ramp(units: Sequence[float], rate: float) -> list[float]:
    length = units[-1] / rate * 2 / _RAMP_END if units else 0.0
    return [math.sqrt(unit * 2 * length / (_RAMP_END * rate)) for unit in units]


_CLOCKS: Mapping[str, Callable[[Sequence[float], float], list[float]]] = {
    "poisson": _poisson,
    "gamma": _poisson,
    "bursts": _bursts,
    "ramp": _ramp,
}
ARRIVALS = tuple(_CLOCKS)
"""Poisson; gamma gaps (coefficient of variation 3); bursts, 2 s of every 10 s at five times the rate; a ramp."""


def make_trace(mix: str, rate: float, count: int, seed: int, arrivals: str = "poisson") -> tuple[Ask, ...]:
    """Return ``count`` requests at ``rate`` pictures a second. Another rate stretches the same requests in time.

    Raises:
        KeyError: there is no such mix, or no such arrivals.
    """
    chosen, dice = MIXES[mix], random.Random(f"{mix} {arrivals} {seed}")
    names, shares = list(chosen.schedules), list(chosen.schedules.values())
    units, unit = list[float](), 0.0
    shape = 1.0 if arrivals != "gamma" else _GAMMA_CV**-2
    for _ in range(count):
        unit += dice.gammavariate(shape, 1.0 / shape)
        units.append(unit)
    times = _CLOCKS[arrivals](units, rate / chosen.pictures)
    return tuple(
        Ask(
            at=at,
            schedule=dice.choices(names, shares)[0],
            seed=dice.randrange(2**31),
            pictures=4 if dice.random() < chosen.four else 1,
            partial_images=1 if dice.random() < chosen.streamed else 0,
        )
        for at in times
    )
