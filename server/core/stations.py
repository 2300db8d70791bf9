"""The queues between admission and reply: encode -> one per cascade stage -> decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from server.core.latency import StationKey
from server.core.request import Entry


class Station:
    """One queue. Entries keep the order they joined in; the policy ranks them."""

    def __init__(self, key: StationKey) -> None:
        self.key = key
        self.entries: list[Entry] = []


class Stations:
    """All queues of the house, made as they are first needed. Guarded by the executor's lock."""

    def __init__(self) -> None:
        self._stations: dict[StationKey, Station] = {}

    def __iter__(self) -> Iterator[Station]:
        return iter(self._stations.values())

    def open(self, keys: Iterable[StationKey]) -> None:
        """Make stations ahead of their first entry, so that metrics show them at 0."""
        for key in keys:
            self._stations.setdefault(key, Station(key))

    def join(self, key: StationKey, entry: Entry) -> None:
        """Put an entry at the end of a queue and note when."""
        self.open([key])
        entry.joined = time.monotonic()
        self._stations[key].entries.append(entry)

    def take(self, station: Station, entries: Iterable[Entry]) -> None:
        """Remove the entries that are about to run."""
        gone = set(map(id, entries))
        station.entries = [entry for entry in station.entries if id(entry) not in gone]

    def remove(self, unwanted: Callable[[Entry], bool]) -> list[Entry]:
        """Remove and return every waiting entry for which ``unwanted`` holds."""
        removed: list[Entry] = []
        for station in self._stations.values():
            kept: list[Entry] = []
            for entry in station.entries:
                (removed if unwanted(entry) else kept).append(entry)
            station.entries = kept
        return removed

    def depths(self) -> dict[StationKey, int]:
        """Return how many entries wait at each station."""
        return {key: len(station.entries) for key, station in self._stations.items()}
