"""Batching at every step, one compatible group at a time: what diffusion engines with step-level batching do.

The oldest request says which schedule runs; every waiting ticket of that schedule at that request's station joins its
batch, whatever step it is at. While there is room, newcomers' texts come first, so that they can join. Costs are not
looked at.
"""

from __future__ import annotations

from server.core.costs import CostTable
from server.core.policies.base import Choice, arrival, first_come
from server.core.stations import Stations
from server.core.work import Work


class ContinuousPolicy:
    """See the module.

    Args:
        costs: only the widths that stations have are read from it.
        size: rows of a batch at most.
    """

    def __init__(self, costs: CostTable, size: int = 8) -> None:
        self._costs = costs
        self._size = size

    def charge(self, work: Work, seconds: float) -> None:
        """Accounts are all one."""

    def choose(self, stations: Stations, now: float) -> Choice | None:
        """Return the next batch, or None where every queue is empty."""
        oldest = min(stations.waiting(), key=arrival, default=None)
        if oldest is None:
            return None
        station = next(station for station in stations if oldest in station.tickets)
        kin = [t for t in stations.waiting() if t.request.work.schedule == oldest.request.work.schedule]
        entrance = next((each for each in stations if each.key.kind == "encode"), station)
        newcomers = [t for t in kin if t in entrance.tickets]
        if newcomers and len(kin) - len(newcomers) < self._size:
            station = entrance
        kin = [t for t in kin if t in station.tickets]
        return Choice(station, first_come(kin, station, min(self._size, max(self._costs.widths(station.key)))))
