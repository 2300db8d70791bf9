"""What batches cost to a policy when several run at a time, each on a part of the device."""

from __future__ import annotations

from server.core.costs import CostTable
from server.core.stations import StationKey

ENTER_TRACKS, LEAVE_TRACKS = 24, 12
"""Waiting tickets from which on, and below which no more, batches go on tracks: see docs/engines.md, Tracks."""


class TrackCosts(CostTable):
    """A table as it looks from one of ``count`` tracks, each of which has its equal part of the device.

    A batch of w rows on one of them takes the time of ``count`` x w rows that have the whole device, for so many are
    computed meanwhile.

    Args:
        table: of batches that have the whole device.

    Attributes:
        count: of tracks; 1 shows the table as it is.
    """

    def __init__(self, table: CostTable) -> None:
        super().__init__({})
        self._table = table
        self.count = 1

    def widths(self, key: StationKey) -> tuple[int, ...]:
        """See :class:`CostTable`."""
        widths = self._table.widths(key)
        return tuple(width // self.count for width in widths if width % self.count == 0) or widths[:1]

    def seconds(self, key: StationKey, rows: int) -> float:
        """See :class:`CostTable`."""
        return self._table.seconds(key, rows * self.count)

    def first(self, key: StationKey, rows: int) -> float:
        """See :class:`CostTable`."""
        return self._table.first(key, rows)

    def hoped(self, key: StationKey, rows: int) -> float:
        """See :class:`CostTable`."""
        return self._table.hoped(key, rows * self.count)
