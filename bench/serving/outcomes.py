"""What became of a trace: one outcome a request, and the batches that ran."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.serving.traces import Ask
from server.core.stations import StationKey


@dataclass
class Outcome:
    """One request's fate. Times are seconds from the trace's start.

    Attributes:
        sent: when it was meant to be sent; latencies count from here, however late the sender was.
        status: as on the wire: 200, 429, 504, ...; 0 while it is under way.
    """

    ask: Ask
    sent: float
    status: int = 0
    first_partial: float = math.nan
    finished: float = math.nan

    @property
    def latency(self) -> float:
        """Seconds until the whole reply; without end where there was none."""
        return self.finished - self.sent if self.status == 200 else math.inf


@dataclass
class StationCount:
    """The batches of one station: ``rows`` that were asked for, ``padding`` rows that ran beside them."""

    batches: int = 0
    rows: int = 0
    padding: int = 0
    seconds: float = 0.0


@dataclass
class Batches:
    """All batches of a run.

    Attributes:
        widths: batches by (station label, rows).
        gaps: seconds between two batches while something waited.
    """

    stations: dict[str, StationCount] = field(default_factory=dict)
    widths: dict[tuple[str, int], int] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)

    def add(self, key: StationKey, rows: int, width: int, seconds: float) -> None:
        """Count one batch of ``rows`` rows that ran at ``width``."""
        label = key.label
        count = self.stations.get(label)
        if count is None:
            count = self.stations[label] = StationCount()
        count.batches += 1
        count.rows += rows
        count.padding += width - rows
        count.seconds += seconds
        self.widths[label, rows] = self.widths.get((label, rows), 0) + 1

    @property
    def seconds(self) -> float:
        """Seconds in which the device ran a batch."""
        return sum(count.seconds for count in self.stations.values())


@dataclass
class Run:
    """One policy, one trace.

    Attributes:
        seconds: from the trace's start to the last reply.
    """

    policy: str
    outcomes: list[Outcome]
    batches: Batches
    seconds: float
    devices: int = 1

    @property
    def busy(self) -> float:
        """Share of the devices' time in which a batch ran."""
        return self.batches.seconds / max(self.seconds * self.devices, 1e-9)


def whole_rate(outcomes: Iterable[Outcome]) -> float:
    """Return pictures a second from the first request to the last reply.

    A window within would favour whoever brings all requests on alike, or him who finishes some of them first: what is
    half made at its ends counts for nothing.
    """
    done = [(outcome.finished, outcome.ask.pictures) for outcome in outcomes if outcome.status == 200]
    if not done:
        return math.nan
    return sum(pictures for _, pictures in done) / max(max(at for at, _ in done), 1e-9)
