"""A trace against a running engine, on the real clock."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev

from bench.serving.link import Link
from bench.serving.outcomes import Batches, Outcome, Run
from bench.serving.traces import Ask
from server.core.messages import Began, Ended, Lost, Message, Pixels, Submit, Unable, UsePolicy
from server.core.stations import StationKey

_LEAD = 0.1  # seconds between the call and the trace's start
_TICK = 1e-4  # seconds: no wait is shorter
_SILENCE = 120.0  # seconds without a message, with requests on their way, after which the engine is given up


class EngineGoneError(RuntimeError):
    """The engine ended, or says nothing any more."""


@dataclass
class Watch:
    """What is noted besides outcomes.

    Attributes:
        widths: a station's widths, from the engine's table; padding is counted with them.
        seconds: by (station, width), every batch's seconds.
        gaps: seconds between two batches while something waited.
    """

    widths: Mapping[StationKey, Sequence[int]]
    seconds: dict[tuple[StationKey, int], list[float]] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)

    def add(self, other: Watch) -> None:
        """Take in what another has seen."""
        for place, seconds in other.seconds.items():
            self.seconds.setdefault(place, []).extend(seconds)
        self.gaps += other.gaps

    def clear(self) -> None:
        """Forget everything seen so far."""
        self.seconds.clear()
        self.gaps.clear()

    def gap(self) -> float:
        """Return what lies between two batches on average."""
        return trimmed_mean(self.gaps) if self.gaps else 0.0

    def scatter(self) -> float:
        """Return how far batches scatter around their medians, as the simulator takes it; the worst hundredth left
        out."""
        logs = [
            math.log(one / median(seconds))
            for seconds in self.seconds.values()
            if len(seconds) >= 9
            for one in sorted(seconds)[: max(int(0.99 * len(seconds)), 1)]
        ]
        return stdev(logs) if len(logs) > 1 else 0.0


def trimmed_mean(values: Sequence[float]) -> float:
    """Return the mean, the largest hundredth left out."""
    return fmean(sorted(values)[: max(int(0.99 * len(values)), 1)])


class Replay:
    """One policy, one trace.

    Args:
        link: an idle engine.
        clients: None sends each request at its time; a number keeps that many on their way instead.
        deadline_seconds: from the intended send time.
    """

    def __init__(
        self,
        link: Link,
        watch: Watch,
        trace: Sequence[Ask],
        clients: int | None = None,
        deadline_seconds: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link, self._watch, self._deadline = link, watch, deadline_seconds
        self._clock = clock
        self._waiting = deque(trace)
        self._clients = clients
        self._names: dict[str, Outcome] = {}
        self._left: dict[str, int] = {}
        self._outcomes: list[Outcome] = []
        self._batches = Batches()
        self._start = 0.0
        self._idle_since: float | None = None

    def run(self, policy: str, prefix: str) -> Run:
        """Play the trace. ``prefix`` makes its requests' names unlike those of other runs.

        Raises:
            EngineGoneError: the engine ended, or fell silent.
        """
        self._link.send(UsePolicy(policy))
        self._start = self._clock() + _LEAD
        heard = self._clock()
        while self._waiting or self._left:
            now = self._clock()
            self._send_due(now - self._start, prefix)
            received = self._link.receive(self._patience(now - self._start))
            if received is not None:
                heard = self._clock()
                self._hear(received[0], heard - self._start)
            elif self._left and self._clock() - heard > _SILENCE:
                raise EngineGoneError(f"no word from the engine for {_SILENCE:g} s")
        seconds = max((outcome.finished for outcome in self._outcomes), default=0.0)
        return Run(policy, self._outcomes, self._batches, seconds)

    def _patience(self, now: float) -> float:
        if now < 0:
            return -now
        if self._clients is None and self._waiting:
            return min(max(self._waiting[0].at - now, _TICK), 1.0)
        return 1.0

    def _send_due(self, now: float, prefix: str) -> None:
        while self._waiting and now >= 0:
            if self._clients is None and self._waiting[0].at > now:
                return
            if self._clients is not None and len(self._left) >= self._clients:
                return
            ask = self._waiting.popleft()
            outcome = Outcome(ask, ask.at if self._clients is None else now)
            name = f"{prefix}-{len(self._outcomes)}"
            self._outcomes.append(outcome)
            self._names[name], self._left[name] = outcome, ask.pictures
            arrived = self._start + outcome.sent
            self._link.send(Submit(ask.work(name, arrived, arrived + self._deadline)))

    def _hear(self, message: Message, now: float) -> None:
        if isinstance(message, Began):
            if self._idle_since is not None:
                self._batches.gaps.append(now - self._idle_since)
        elif isinstance(message, Ended):
            self._idle_since = now
            if message.rows:
                # On one of n tracks it takes what n times as many rows take that have the whole device.
                rows = message.rows * message.tracks
                width = next((w for w in self._watch.widths.get(message.key, ()) if w >= rows), rows)
                seconds = message.seconds / message.tracks
                self._batches.add(message.key, message.rows, width // message.tracks, seconds)
                self._watch.seconds.setdefault((message.key, width), []).append(message.seconds)
            if not any(moved.station for moved in message.moved) and not self._left:
                self._idle_since = None
        elif isinstance(message, Pixels) and message.id in self._left:
            self._made(message, now)
        elif isinstance(message, Lost) and message.id in self._left:
            del self._left[message.id]
            outcome = self._names[message.id]
            outcome.status, outcome.finished = 504 if message.why == "late" else 500, now
        elif isinstance(message, Unable):
            raise EngineGoneError(message.reason)

    def _made(self, message: Pixels, now: float) -> None:
        outcome = self._names[message.id]
        if message.number >= 0:
            outcome.first_partial = min(now, outcome.first_partial) if outcome.first_partial > 0 else now
            return
        self._left[message.id] -= 1
        if not self._left[message.id]:
            del self._left[message.id]
            outcome.status, outcome.finished = 200, now
            if not self._left:
                self._idle_since = None  # nothing was left to do: the next batch is not late
