"""What is read off runs: saturation, latencies from the intended send time, the most that is served well, fairness."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from bench.serving.outcomes import Outcome, Run, whole_rate
from bench.serving.simulate import PolicyMaker, World, simulate
from bench.serving.tables import Machine
from bench.serving.traces import Ask, make_trace

SLOWEST = 5.0
"""A request is served well that takes at most this many times what it takes alone."""

CLIENTS = 64
"""On their way at once where saturation is measured: as many as the server's queue admits."""


class Alone:
    """Seconds of each kind of request on an idle machine, run together as one request and with nobody else."""

    def __init__(self, machine: Machine, world: World = World()) -> None:
        self._machine = machine
        self._world = World(batch_seconds=world.batch_seconds, front_seconds=world.front_seconds)
        self._seconds: dict[str, float] = {}

    def seconds(self, ask: Ask) -> float:
        """Return what a request of this kind takes alone."""
        known = self._seconds.get(ask.kind)
        if known is None:
            run = simulate(self._machine, "fifo", [ask], self._world)
            known = self._seconds[ask.kind] = run.outcomes[0].latency
        return known

    def slowdowns(self, outcomes: Iterable[Outcome]) -> list[float]:
        """Return each request's latency over what it takes alone; without end where it was refused or late."""
        return [outcome.latency / self.seconds(outcome.ask) for outcome in outcomes]


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of them do not exceed; NaN of none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def saturations(
    machine: Machine,
    policy: str | PolicyMaker,
    mix: str,
    seeds: Sequence[int],
    count: int = 1500,
    world: World = World(),
) -> list[float]:
    """Return pictures a second with :data:`CLIENTS` requests always on their way, one figure a seed."""
    runs = (simulate(machine, policy, make_trace(mix, 1.0, count, seed), world, CLIENTS) for seed in seeds)
    return [whole_rate(run.outcomes) for run in runs]


def pooled(
    machine: Machine,
    policy: str | PolicyMaker,
    mix: str,
    rate: float,
    seeds: Sequence[int],
    count: int = 2000,
    arrivals: str = "poisson",
    world: World = World(),
) -> list[Run]:
    """Return one run a seed at ``rate`` pictures a second."""
    return [simulate(machine, policy, make_trace(mix, rate, count, seed, arrivals), world) for seed in seeds]


def best_rate(served_well: Callable[[float], bool], low: float, high: float, tolerance: float = 0.01) -> float:
    """Return the most pictures a second for which ``served_well`` holds, by bisection; 0 where none does."""
    if not served_well(low):
        return 0.0
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        if served_well(middle):
            low = middle
        else:
            high = middle
    return low


def served_rate(points: Sequence[tuple[float, float]]) -> float:
    """Return the most that is served well, from measured (rate, slowdown of the 99th percentile).

    Between the last rate that is served well and the first that is not, the slowdown's logarithm lies on a straight
    line. The highest rate where all are served well, a share of the lowest one where none is.
    """
    points = sorted(points)
    rate, slowdown = points[0]
    if slowdown > SLOWEST:
        return rate * SLOWEST / slowdown
    for beyond, slower in points[1:]:
        if slower > SLOWEST:
            if math.isinf(slower):
                return rate
            part = math.log(SLOWEST / slowdown) / math.log(slower / slowdown)
            return rate + part * (beyond - rate)
        rate, slowdown = beyond, slower
    return rate


def jain(values: Iterable[float]) -> float:
    """Return Jain's index: 1 where all are alike, 1/n where one has everything."""
    listed = list(values)
    squares = sum(value * value for value in listed)
    return sum(listed) ** 2 / (len(listed) * squares) if squares else math.nan


def bootstrap(pairs: Sequence[tuple[float, float]], draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Return the ratio of the sums of pairs (ours, theirs), and its interval of 95 % over redrawn pairs."""

    def ratio(drawn: Sequence[tuple[float, float]]) -> float:
        return sum(ours for ours, _ in drawn) / max(sum(theirs for _, theirs in drawn), 1e-12)

    dice = random.Random(seed)
    drawn = sorted(ratio(dice.choices(pairs, k=len(pairs))) for _ in range(draws))
    return ratio(pairs), drawn[int(0.025 * draws)], drawn[int(0.975 * draws) - 1]


def summary(runs: Sequence[Run], alone: Alone) -> dict[str, Any]:
    """Return the figures of one policy at one load, a run a seed. Latencies count from the intended send time."""
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    count = max(len(outcomes), 1)
    latencies = [outcome.latency for outcome in outcomes]
    slow = alone.slowdowns(outcomes)
    seconds = max(sum(run.seconds for run in runs), 1e-9)
    made = sum(outcome.ask.pictures for outcome in outcomes if outcome.status == 200)
    well = sum(o.ask.pictures for o, factor in zip(outcomes, slow, strict=True) if factor <= SLOWEST)
    partials = [o.first_partial - o.sent for o in outcomes if not math.isnan(o.first_partial)]
    gaps = [gap for run in runs for gap in run.batches.gaps]
    by_kind: dict[str, list[float]] = {}
    for outcome, factor in zip(outcomes, slow, strict=True):
        if math.isfinite(factor):
            by_kind.setdefault(outcome.ask.kind, []).append(factor)
    figures: dict[str, Any] = {
        "pictures_per_second": made / seconds,
        "goodput": well / seconds,
        "p90": percentile(latencies, 0.9),
        "p95": percentile(latencies, 0.95),
        "mean": fmean([value for value in latencies if math.isfinite(value)] or [math.nan]),
        "slowdown_p50": percentile(slow, 0.5),
        "slowdown_p99": percentile(slow, 0.99),
        "first_partial_p50": percentile(partials, 0.5),
        "first_partial_p95": percentile(partials, 0.95),
        "refused": sum(outcome.status == 429 for outcome in outcomes) / count,
        "late": sum(outcome.status == 504 for outcome in outcomes) / count,
        "busy": fmean(run.busy for run in runs),
        "gap_p50": percentile(gaps, 0.5),
        "gap_p95": percentile(gaps, 0.95),
        "fairness": jain(fmean(factors) for factors in by_kind.values()),
        "stations": _stations(runs),
        "slowdown_p99_by_seed": [percentile(alone.slowdowns(run.outcomes), 0.99) for run in runs],
    }
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        figures[name] = percentile(latencies, share)
        figures[f"{name}_by_seed"] = [percentile((o.latency for o in run.outcomes), share) for run in runs]
    return figures


def _stations(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Mean rows of a batch and the share of padding, by station."""
    found: dict[str, dict[str, float]] = {}
    for label in dict.fromkeys(label for run in runs for label in run.batches.stations):
        counts = [run.batches.stations[label] for run in runs if label in run.batches.stations]
        rows, padding = sum(c.rows for c in counts), sum(c.padding for c in counts)
        found[label] = {
            "rows": rows / max(sum(c.batches for c in counts), 1),
            "padding": padding / max(rows + padding, 1),
        }
    return found
