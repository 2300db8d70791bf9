"""The queues between admission and reply: encode -> one per cascade stage -> decode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rmd.size import Size

if TYPE_CHECKING:
    from server.core.tickets import Ticket

Kind = Literal["encode", "denoise", "decode"]
STUDENT = "student"
TEACHER = "teacher"


@dataclass(frozen=True)
class StationKey:
    """One station: what is done, with whose weights, at which picture size.

    Attributes:
        model: of which checkpoint, see :attr:`ModelCard.place`.
    """

    kind: Kind
    lane: str = STUDENT
    size: Size | None = None
    model: str = ""

    @property
    def label(self) -> str:
        """Its name in metrics and replies: ``encode``, ``128x128``, ``teacher 256x256``, ``decode 256x256``.

        Another checkpoint's than the first has its id in front: ``films decode 144x144``.
        """
        size = "" if self.size is None else str(self.size)
        if self.kind == "denoise":
            parts = [self.model, "" if self.lane == STUDENT else self.lane, size]
        else:
            parts = [self.model, self.kind, size]
        return " ".join(filter(None, parts))


class Station:
    """One queue. Tickets keep the order they joined in; the policy ranks them."""

    def __init__(self, key: StationKey) -> None:
        self.key = key
        self.tickets: list[Ticket] = []


class Stations:
    """All queues of one engine, made as they are first needed."""

    def __init__(self, keys: Iterable[StationKey] = ()) -> None:
        self._stations: dict[StationKey, Station] = {}
        self.open(keys)

    def __iter__(self) -> Iterator[Station]:
        return iter(self._stations.values())

    def open(self, keys: Iterable[StationKey]) -> None:
        """Make stations ahead of their first ticket, so that metrics show them at 0."""
        for key in keys:
            self._stations.setdefault(key, Station(key))

    def join(self, key: StationKey, ticket: Ticket, now: float) -> None:
        """Put a ticket at the end of a queue and note when."""
        self.open([key])
        ticket.joined = now
        self._stations[key].tickets.append(ticket)

    def take(self, station: Station, tickets: Iterable[Ticket]) -> None:
        """Remove the tickets that are about to run."""
        gone = set(map(id, tickets))
        station.tickets = [ticket for ticket in station.tickets if id(ticket) not in gone]

    def remove(self, unwanted: Callable[[Ticket], bool]) -> list[Ticket]:
        """Remove and return every waiting ticket for which ``unwanted`` holds."""
        removed: list[Ticket] = []
        for station in self._stations.values():
            kept: list[Ticket] = []
            for ticket in station.tickets:
                (removed if unwanted(ticket) else kept).append(ticket)
            station.tickets = kept
        return removed

    def waiting(self) -> Iterator[Ticket]:
        """Every waiting ticket."""
        for station in self._stations.values():
            yield from station.tickets
