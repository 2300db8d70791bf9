"""``rmd bench serve``: every policy over the same real engines and the same traces, interleaved in one run."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from typing import Any

from bench.serving.link import Link
from bench.serving.measures import CLIENTS, SLOWEST, Alone, bootstrap, percentile, summary
from bench.serving.outcomes import Run, steady_rate
from bench.serving.replay import EngineGoneError, Replay, Watch
from bench.serving.simulate import World, simulate
from bench.serving.tables import Machine
from bench.serving.traces import Ask, make_trace
from server.core.messages import Message, Ready, Unable

_LOADING_SECONDS = 900.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class LiveSettings:
    """What is measured.

    Attributes:
        policy: the rule under test.
        loads: shares of the best baseline's saturation.
        saturated, count: requests of a closed and of an open run.
        seeds: a trace each; every policy meets each of them.
    """

    policy: str = "stagewise"
    baselines: tuple[str, ...] = (
        "fifo",
        "dynamic:4:0",
        "dynamic:8:0",
        "dynamic:8:0.02",
        "continuous:4",
        "continuous:8",
    )
    mixes: tuple[str, ...] = ("2+2", "mix")
    loads: tuple[float, ...] = (0.5, 0.7, 0.9)
    arrivals: str = "poisson"
    seeds: tuple[int, ...] = (0, 1, 2)
    saturated: int = 256
    count: int = 300
    deadline_seconds: float = 120.0

    @property
    def policies(self) -> tuple[str, ...]:
        """The rule and its rivals."""
        return (self.policy, *self.baselines)


def wait_until_ready(link: Link, say: Say) -> Ready:
    """Return the engine's word that it is ready.

    Raises:
        EngineGoneError: it cannot start, or says nothing.
    """
    while True:
        received = link.receive(_LOADING_SECONDS)
        if received is None:
            raise EngineGoneError("the engine does not get ready")
        message: Message = received[0]
        if isinstance(message, Unable):
            raise EngineGoneError(message.reason)
        if isinstance(message, Ready):
            return message
        say(getattr(message, "text", ""))


def run_live(
    settings: LiveSettings, link: Link, say: Say = lambda _: None, clock: Callable[[], float] = time.monotonic
) -> dict[str, Any]:
    """Measure everything over one engine, which is left idle; see :func:`bench.serving.report.live_markdown`."""
    ready = wait_until_ready(link, say)
    first = {key: {w: s for k, w, s in ready.costs if k == key} for key, _, _ in ready.costs}
    watch = Watch({key: tuple(sorted(widths)) for key, widths in first.items()})
    bench = _Bench(settings, link, watch, Machine("live", "", ready.card, first), say, clock)
    bench.warm_up()
    parts = [bench.part(mix) for mix in settings.mixes]
    learnt = bench.learnt()
    return {
        "format": 1,
        "kind": "live",
        "settings": asdict(settings),
        "slowest": SLOWEST,
        "model": ready.card.model_id,
        "parts": parts,
        "noise": bench.noise(),
        "costs": [
            [key.kind, key.lane, str(key.size or ""), w, s] for key, row in learnt.items() for w, s in row.items()
        ],
        "validation": [line for part in parts for line in bench.validate(part)],
    }


class _Bench:
    """One engine and what is known of it."""

    def __init__(
        self,
        settings: LiveSettings,
        link: Link,
        watch: Watch,
        machine: Machine,
        say: Say,
        clock: Callable[[], float],
    ) -> None:
        self._settings, self._link, self._watch, self._machine, self._say = settings, link, watch, machine, say
        self._clock = clock
        self._runs = 0
        self._gaps: list[float] = []

    def warm_up(self) -> None:
        """Run every policy once, so that costs are learnt before anything counts."""
        for policy in self._settings.policies:
            self._say(f"warming up {policy}")
            self._play(policy, make_trace(self._settings.mixes[-1], 1.0, CLIENTS, 999), CLIENTS)
        self._watch.seconds.clear()
        self._gaps.clear()

    def part(self, mix: str) -> dict[str, Any]:
        """Measure one mix: saturation first, then the loads, each in rounds of random order."""
        settings = self._settings
        rates: dict[str, list[float]] = {policy: [] for policy in settings.policies}
        full: dict[str, list[Run]] = {policy: [] for policy in settings.policies}
        for seed, policy in self._rounds():
            self._say(f"{mix}: saturation, seed {seed}, {policy}")
            run = self._play(policy, make_trace(mix, 1.0, settings.saturated, seed), CLIENTS)
            rates[policy].append(steady_rate(run.outcomes))
            full[policy].append(run)
        best = max(settings.baselines, key=lambda policy: fmean(rates[policy]))
        top = fmean(rates[best])
        alone = Alone(Machine("live", "", self._machine.card, self.learnt()))
        loads: dict[str, dict[str, Any]] = {}
        for load in settings.loads:
            runs: dict[str, list[Run]] = {policy: [] for policy in settings.policies}
            for seed, policy in self._rounds():
                self._say(f"{mix}: {load:.0%} of {best}'s saturation, seed {seed}, {policy}")
                trace = make_trace(mix, load * top, settings.count, seed, settings.arrivals)
                runs[policy].append(self._play(policy, trace))
            loads[f"{load:g}"] = {p: {"rate": load * top} | summary(each, alone) for p, each in runs.items()}
        saturated = {
            policy: {"saturated": fmean(each), "saturated_by_seed": each} | _at_full(full[policy])
            for policy, each in rates.items()
        }
        return {"machine": "live", "mix": mix, "limits": saturated, "loads": loads} | {
            "claims": _claims(settings, saturated, loads)
        }

    def learnt(self) -> dict[Any, dict[int, float]]:
        """Return the machine's table: medians of the batches that ran, first timings where fewer than three did."""
        table = {key: dict(widths) for key, widths in self._machine.costs.items()}
        for (key, width), seconds in self._watch.seconds.items():
            if len(seconds) >= 3:
                table.setdefault(key, {})[width] = median(seconds)
        return table

    def noise(self) -> float:
        """Return how far batches scatter around their medians, as the simulator takes it."""
        logs = [
            math.log(one / median(seconds))
            for seconds in self._watch.seconds.values()
            if len(seconds) >= 9
            for one in sorted(seconds)[: max(int(0.99 * len(seconds)), 1)]
        ]
        return stdev(logs) if len(logs) > 1 else 0.0

    def validate(self, part: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what the simulator says of the same traces, beside what was measured."""
        settings, learnt = self._settings, Machine("live", "", self._machine.card, self.learnt())
        gap = median(self._gaps) if self._gaps else 0.0
        lines = []
        for policy in settings.policies:
            world = World(noise=self.noise(), batch_seconds=gap, deadline_seconds=settings.deadline_seconds)
            runs = [
                simulate(learnt, policy, make_trace(part["mix"], 1.0, settings.saturated, seed), world, CLIENTS)
                for seed in settings.seeds
            ]
            told = fmean(steady_rate(run.outcomes) for run in runs)
            real = part["limits"][policy]["saturated"]
            lines.append({"mix": part["mix"], "policy": policy, "load": "saturated", "rate": [real, told]})
            for load, figures in part["loads"].items():
                each = figures[policy]
                runs = [
                    simulate(
                        learnt,
                        policy,
                        make_trace(part["mix"], each["rate"], settings.count, seed, settings.arrivals),
                        world,
                    )
                    for seed in settings.seeds
                ]
                latencies = [outcome.latency for run in runs for outcome in run.outcomes]
                rate = sum(o.ask.pictures for run in runs for o in run.outcomes) / sum(run.seconds for run in runs)
                line = {"mix": part["mix"], "policy": policy, "load": load}
                line |= {name: [each[name], percentile(latencies, s)] for name, s in (("p50", 0.5), ("p99", 0.99))}
                lines.append(line | {"rate": [each["pictures_per_second"], rate]})
        return lines

    def _rounds(self) -> list[tuple[int, str]]:
        """Every policy once a seed, in an order of its own each time: what drifts meets all alike."""
        pairs = []
        for seed in self._settings.seeds:
            order = list(self._settings.policies)
            random.Random(f"{seed} {self._runs}").shuffle(order)
            pairs += [(seed, policy) for policy in order]
        return pairs

    def _play(self, policy: str, trace: Sequence[Ask], clients: int | None = None) -> Run:
        self._runs += 1
        replay = Replay(self._link, self._watch, trace, clients, self._settings.deadline_seconds, self._clock)
        run = replay.run(policy, f"run{self._runs}")
        self._gaps += run.batches.gaps
        return run


def _at_full(runs: Sequence[Run]) -> dict[str, Any]:
    """Saturated: the share of time in batches, the gaps, and every width that ran, for a bare loop to run again."""
    gaps = [gap for run in runs for gap in run.batches.gaps]
    widths: dict[str, int] = {}
    for run in runs:
        for (label, rows), count in run.batches.widths.items():
            widths[f"{label}: {rows}"] = widths.get(f"{label}: {rows}", 0) + count
    made = sum(outcome.ask.pictures for run in runs for outcome in run.outcomes if outcome.status == 200)
    seconds = sum(run.batches.seconds for run in runs)
    return {
        "busy": fmean(run.busy for run in runs),
        "bare": made / max(seconds, 1e-9),
        "gap_p50": percentile(gaps, 0.5),
        "gap_p95": percentile(gaps, 0.95),
        "widths": widths,
    }


def _claims(settings: LiveSettings, limits: Mapping[str, Any], loads: Mapping[str, Any]) -> dict[str, Any]:
    """The rule under test over the best baseline, by measure: [ratio, low, high, that baseline]."""
    tables: dict[str, tuple[Mapping[str, Any], str]] = {"saturated": (limits, "saturated")}
    for load, rows in loads.items():
        tables |= {f"{measure} at {load}": (rows, measure) for measure in ("p50", "p99")}
    claims: dict[str, Any] = {}
    for name, (rows, measure) in tables.items():
        choose = max if measure == "saturated" else min
        best = choose(settings.baselines, key=lambda policy: rows[policy][measure])
        ours, theirs = rows[settings.policy], rows[best]
        pairs = list(zip(ours[f"{measure}_by_seed"], theirs[f"{measure}_by_seed"], strict=True))
        _, low, high = bootstrap(pairs)
        claims[name] = [ours[measure] / max(theirs[measure], 1e-9), low, high, best]
    return claims
