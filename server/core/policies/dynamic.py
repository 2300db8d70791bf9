"""Dynamic batching of whole requests: what general model servers do.

Up to ``size`` pictures of one schedule are gathered, at most ``window`` seconds long, then run from their texts to
their pixels before the next group begins.
"""

from __future__ import annotations

from server.core.costs import CostTable
from server.core.policies.base import Choice, Hold, arrival, first_come, next_station
from server.core.stations import Stations
from server.core.tickets import Preview, Request, Ticket
from server.core.work import Work


class DynamicPolicy:
    """See the module.

    Args:
        costs: only the widths that stations have are read from it.
        size: pictures in a group at most. A request of more pictures is a group of its own.
        window: seconds that a group waits for company, from its first member's arrival at the queue.
    """

    def __init__(self, costs: CostTable, size: int = 8, window: float = 0.02) -> None:
        self._costs = costs
        self._size, self._window = size, window
        self._group: set[Request] = set()

    def charge(self, work: Work, seconds: float) -> None:
        """Accounts are all one."""

    def choose(self, stations: Stations, now: float) -> Choice | Hold | None:
        """Return the next batch of the present group, or gather another."""
        waiting = [ticket for ticket in stations.waiting() if ticket.request in self._group]
        if not waiting:
            gathered = self._gather(stations, now)
            if not isinstance(gathered, set):
                return gathered
            self._group = gathered
        found = next_station(stations, self._group)
        if found is None:
            return None
        station, own = found
        return Choice(station, first_come(own, station, min(self._size, max(self._costs.widths(station.key)))))

    def _gather(self, stations: Stations, now: float) -> set[Request] | Hold | None:
        newcomers = sorted((t for t in stations.waiting() if not isinstance(t, Preview)), key=arrival)
        if not newcomers:
            return None
        head = newcomers[0]
        members = dict[Request, list[Ticket]]()
        for ticket in newcomers:
            if ticket.request.work.schedule == head.request.work.schedule:
                members.setdefault(ticket.request, []).append(ticket)
        group, pictures = set[Request](), 0
        for request, tickets in members.items():
            if group and pictures + len(tickets) > self._size:
                break
            group.add(request)
            pictures += len(tickets)
        until = head.request.work.arrived + self._window
        return Hold(until) if pictures < self._size and now < until else group
