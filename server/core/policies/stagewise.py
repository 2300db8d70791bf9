"""Which station runs next, and with whom.

The rule is *highest response ratio next*: an entry's priority is the time since its request arrived over the work
it still needs. What is nearly finished goes first (later stages before earlier ones, four-step students before
fifty-step teachers), and whatever waits gains on everything else: under overload every request is slowed by about
the same factor. Serving late stages first also lets the cheap low-resolution queues fill up, which is where wide
batches pay. Since a long request may not win its turn before its deadline that way, whatever is about to miss its
deadline goes before everything else.
"""

from __future__ import annotations

from collections.abc import Iterable

from server.core.latency import LatencyTable
from server.core.request import Entry
from server.core.stations import Station

_LEAST_WORK = 1e-4
_URGENT = 2.0  # times its own work is left until its deadline


class StagePolicy:
    """Highest response ratio next; batch widths from measured latencies. Never waits while anything is queued."""

    def __init__(self, latencies: LatencyTable) -> None:
        self._latencies = latencies

    @staticmethod
    def priority(entry: Entry, now: float) -> tuple[bool, float]:
        """Return (about to miss its deadline, response ratio (wait + work) / work); the larger goes first."""
        work = max(entry.remaining_seconds, _LEAST_WORK)
        urgent = entry.generation.deadline - now < _URGENT * work
        return urgent, (now - entry.generation.arrived + work) / work

    def choose(self, stations: Iterable[Station], now: float) -> tuple[Station, list[Entry]] | None:
        """Return the next batch and its station, or None where every queue is empty. Takes nothing out."""
        best: tuple[tuple[bool, float], Station, list[Entry]] | None = None
        for station in stations:
            if not station.entries:
                continue
            ranked = sorted(station.entries, key=lambda entry: self.priority(entry, now), reverse=True)
            head = self.priority(ranked[0], now)
            if best is None or head > best[0]:
                best = (head, station, ranked)
        if best is None:
            return None
        _, station, ranked = best
        if station.key.kind == "encode":  # all pictures of a request share one prompt
            requests = list(dict.fromkeys(entry.generation for entry in ranked))
            together = set(requests[: self._latencies.best_count(station.key, [1] * len(requests))])
            return station, [entry for entry in ranked if entry.generation in together]
        rows = [entry.rows if station.key.kind == "denoise" else 1 for entry in ranked]
        return station, ranked[: self._latencies.best_count(station.key, rows)]
