"""What a policy is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

from server.core.stations import Station, Stations
from server.core.tickets import Picture, Preview, Request, Ticket
from server.core.work import Work


@dataclass(frozen=True)
class Choice:
    """The next batch: tickets of one station."""

    station: Station
    tickets: Sequence[Ticket]


@dataclass(frozen=True)
class Hold:
    """Nothing yet, though something waits: ask again at ``until`` (monotonic seconds), or when something joins."""

    until: float


class Policy(Protocol):
    """Which station runs next, and with whom."""

    def choose(self, stations: Stations, now: float) -> Choice | Hold | None:
        """Return the next batch, a time to wait until, or None where every queue is empty. Takes nothing out."""

    def charge(self, work: Work, seconds: float) -> None:
        """Note what a request's work has cost the device."""


def rows_of(tickets: Sequence[Ticket], station: Station) -> list[int]:
    """Return each ticket's rows of a batch. At the encode station a request's pictures share one text."""
    if station.key.kind != "encode":
        return [ticket.rows for ticket in tickets]
    seen: set[int] = set()
    rows = []
    for ticket in tickets:
        rows.append(0 if id(ticket.request) in seen else 1)
        seen.add(id(ticket.request))
    return rows


def first_come(tickets: Sequence[Ticket], station: Station, width: int) -> list[Ticket]:
    """Return the tickets, by arrival, that fit into ``width`` rows; at least one."""
    ordered = sorted(tickets, key=arrival)
    total, taken = 0, list[Ticket]()
    for ticket, rows in zip(ordered, rows_of(ordered, station), strict=True):
        total += rows
        if taken and total > width:
            break
        taken.append(ticket)
    return taken


def next_station(stations: Stations, group: AbstractSet[Request]) -> tuple[Station, list[Ticket]] | None:
    """Return the first station where these requests wait, and their tickets; previews first, or they come too late."""
    found = [(station, [t for t in station.tickets if t.request in group]) for station in stations]
    found = [(station, tickets) for station, tickets in found if tickets]
    return min(found, key=lambda pair: not any(isinstance(t, Preview) for t in pair[1]), default=None)


def arrival(ticket: Ticket) -> tuple[float, str, int]:
    """Order by arrival; the pictures of one request in theirs."""
    index = ticket.index if isinstance(ticket, Picture) else -1
    return (ticket.request.work.arrived, ticket.request.work.id, index)
