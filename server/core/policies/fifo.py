"""One request after the other, in order of arrival: what most image servers do."""

from __future__ import annotations

from server.core.costs import CostTable
from server.core.policies.base import Choice, arrival, first_come, next_station
from server.core.stations import Stations
from server.core.work import Work


class FifoPolicy:
    """The oldest request's pictures, together; nobody else's."""

    def __init__(self, costs: CostTable) -> None:
        self._costs = costs

    def charge(self, work: Work, seconds: float) -> None:
        """Accounts are all one."""

    def choose(self, stations: Stations, now: float) -> Choice | None:
        """Return the next batch, or None where every queue is empty."""
        oldest = min(stations.waiting(), key=arrival, default=None)
        if oldest is None:
            return None
        found = next_station(stations, {oldest.request})
        assert found is not None, "a waiting ticket stands at no station"
        station, own = found
        return Choice(station, first_come(own, station, max(self._costs.widths(station.key))))
