"""Who is there: engines say so, fronts ask. Nothing of a request passes through here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq

from server.device.settings import Contact
from server.front.remote import KeyPair

ASK_SECONDS = 1.0
"""Between two askings of an engine or a front."""

_FORGOTTEN_SECONDS = 10.0


class Listing(NamedTuple):
    """What a front is told.

    Attributes:
        keys: all fronts' own; nobody else has the secret half, and engines admit no other key.
        engines: by name.
        foreign: by name, the expected work (seconds) that it has from other fronts.
    """

    keys: KeyPair
    engines: dict[str, Contact]
    foreign: dict[str, float]


class Share(NamedTuple):
    """What an engine is told: the key that it has to admit, and its share of the admitted work (seconds)."""

    key: bytes
    work: float


@dataclass
class _Front:
    seen: float
    work: Mapping[str, float] = field(default_factory=dict)
    scraped: str = ""


class Roster:
    """See the module. Should it be lost, all that it knows is said again within a second.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._keys = KeyPair(*zmq.curve_keypair())
        self._engines: dict[str, tuple[Contact, float]] = {}
        self._fronts: dict[str, _Front] = {}

    async def engine(self, name: str, contact: Contact, admits: bytes) -> Share:
        """Note that an engine is there, or still is. It is listed once it admits fronts by their present key."""
        if admits == self._keys.public:
            self._engines[name] = contact, self._clock()
        self._forget()
        work = sum(sum(front.work.values()) for front in self._fronts.values())
        return Share(self._keys.public, work / max(len(self._engines), 1))

    async def engine_leaves(self, name: str) -> None:
        """Do not list an engine any more."""
        self._engines.pop(name, None)

    async def front(self, name: str, work: Mapping[str, float], scraped: str) -> Listing:
        """Note that a front is there, and what it has given to whom (seconds; "": to nobody yet)."""
        self._fronts[name] = _Front(self._clock(), work, scraped)
        self._forget()
        others = [front for other, front in self._fronts.items() if other != name]
        foreign = {engine: sum(front.work.get(engine, 0.0) for front in others) for engine in self._engines}
        return Listing(self._keys, {engine: contact for engine, (contact, _) in self._engines.items()}, foreign)

    async def front_leaves(self, name: str) -> None:
        """A front has ended."""
        self._fronts.pop(name, None)

    async def scraped(self) -> list[str]:
        """Return where each front's metrics are (host:port)."""
        self._forget()
        return sorted(front.scraped for front in self._fronts.values())

    def _forget(self) -> None:
        oldest = self._clock() - _FORGOTTEN_SECONDS
        self._engines = {name: each for name, each in self._engines.items() if each[1] >= oldest}
        self._fronts = {name: front for name, front in self._fronts.items() if front.seen >= oldest}
