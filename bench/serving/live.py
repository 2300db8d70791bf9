"""``rmd bench serve``: every policy over the same real engines and the same traces, interleaved in one run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from bench.serving.link import Link
from bench.serving.measures import CLIENTS, SLOWEST, Alone, bootstrap, percentile, served_rate, summary
from bench.serving.outcomes import Run, whole_rate
from bench.serving.replay import EngineGoneError, Replay, Watch, trimmed_mean
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
    bench = _Bench(settings, link, watch, Machine("live", "", ready.cards[0], first), say, clock)
    bench.warm_up()
    parts = [bench.part(mix) for mix in settings.mixes]
    learnt = bench.learnt()
    return {
        "format": 1,
        "kind": "live",
        "settings": asdict(settings),
        "slowest": SLOWEST,
        "model": ready.cards[0].model_id,
        "parts": parts,
        "noise": watch.scatter(),
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
        self._by_place: dict[tuple[str, str, str], Watch] = {}
        """What was seen by (mix, policy, load): a machine's speed drifts between runs."""

    def warm_up(self) -> None:
        """Run every policy once, so that costs are learnt before anything counts."""
        for policy in self._settings.policies:
            self._say(f"warming up {policy}")
            self._play(policy, ("", policy, ""), make_trace(self._settings.mixes[-1], 1.0, CLIENTS, 999), CLIENTS)
        self._watch.clear()

    def part(self, mix: str) -> dict[str, Any]:
        """Measure one mix: saturation first, then the loads, each in rounds of random order."""
        settings = self._settings
        rates: dict[str, list[float]] = {policy: [] for policy in settings.policies}
        full: dict[str, list[Run]] = {policy: [] for policy in settings.policies}
        for seed, policy in self._rounds():
            self._say(f"{mix}: saturation, seed {seed}, {policy}")
            place = (mix, policy, "saturated")
            run = self._play(policy, place, make_trace(mix, 1.0, settings.saturated, seed), CLIENTS)
            rates[policy].append(whole_rate(run.outcomes))
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
                runs[policy].append(self._play(policy, (mix, policy, f"{load:g}"), trace))
            loads[f"{load:g}"] = {p: {"rate": load * top} | summary(each, alone) for p, each in runs.items()}
        saturated = {
            policy: {"saturated": fmean(each), "saturated_by_seed": each} | _at_full(full[policy])
            for policy, each in rates.items()
        }
        for policy, figures in saturated.items():
            rows = [load[policy] for load in loads.values()]
            figures["served_well"] = served_rate([(row["rate"], row["slowdown_p99"]) for row in rows])
            figures["served_well_by_seed"] = [
                served_rate([(row["rate"], row["slowdown_p99_by_seed"][i]) for row in rows])
                for i in range(len(settings.seeds))
            ]
        return {"machine": "live", "mix": mix, "limits": saturated, "loads": loads} | {
            "claims": _claims(settings, saturated, loads)
        }

    def learnt(self, *places: tuple[str, str, str]) -> dict[Any, dict[int, float]]:
        """Return the machine's table: means of the batches that ran, first timings where fewer than three did.

        Args:
            places: (mix, policy, load) whose batches count before those of all.
        """
        table = {key: dict(widths) for key, widths in self._machine.costs.items()}
        for watch in (self._watch, *(self._by_place[place] for place in places)):
            for (key, width), seconds in watch.seconds.items():
                if len(seconds) >= 3:
                    table.setdefault(key, {})[width] = trimmed_mean(seconds)
        return table

    def validate(self, part: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what the simulator says of the same traces, beside what was measured.

        It is given each run's own batches, by their means and scatter: what is put to the test is the clock of queues
        and policies, not how steady the machine is.
        """
        settings, lines = self._settings, []
        for policy in settings.policies:
            measured = {"saturated": part["limits"][policy]["saturated"]}
            measured |= {load: figures[policy]["pictures_per_second"] for load, figures in part["loads"].items()}
            for load, rate in measured.items():
                place = (part["mix"], policy, load)
                watch = self._by_place[place]
                known = Machine("live", "", self._machine.card, self.learnt(place))
                world = World(
                    noise=watch.scatter(), batch_seconds=watch.gap(), deadline_seconds=settings.deadline_seconds
                )
                line: dict[str, Any] = {"mix": part["mix"], "policy": policy, "load": load}
                if load == "saturated":
                    traces = [make_trace(part["mix"], 1.0, settings.saturated, seed) for seed in settings.seeds]
                    full = [simulate(known, policy, trace, world, CLIENTS) for trace in traces]
                    lines.append(line | {"rate": [rate, fmean(whole_rate(run.outcomes) for run in full)]})
                    continue
                figures = part["loads"][load][policy]
                wanted = (part["mix"], figures["rate"], settings.count)
                runs = [
                    simulate(known, policy, make_trace(*wanted, seed, settings.arrivals), world)
                    for seed in settings.seeds
                ]
                latencies = [outcome.latency for run in runs for outcome in run.outcomes]
                made = sum(o.ask.pictures for run in runs for o in run.outcomes)
                line |= {name: [figures[name], percentile(latencies, s)] for name, s in (("p50", 0.5), ("p99", 0.99))}
                lines.append(line | {"rate": [rate, made / sum(run.seconds for run in runs)]})
        return lines

    def _rounds(self) -> list[tuple[int, str]]:
        """Every policy once a seed, in an order of its own each time: what drifts meets all alike."""
        pairs = []
        for seed in self._settings.seeds:
            order = list(self._settings.policies)
            random.Random(f"{seed} {self._runs}").shuffle(order)
            pairs += [(seed, policy) for policy in order]
        return pairs

    def _play(self, policy: str, place: tuple[str, str, str], trace: Sequence[Ask], clients: int | None = None) -> Run:
        self._runs += 1
        watch = Watch(self._watch.widths)
        replay = Replay(self._link, watch, trace, clients, self._settings.deadline_seconds, self._clock)
        run = replay.run(policy, f"run{self._runs}")
        watch.gaps += run.batches.gaps
        self._watch.add(watch)
        self._by_place.setdefault(place, Watch(self._watch.widths)).add(watch)
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
    tables: dict[str, tuple[Mapping[str, Any], str]] = {
        "saturated": (limits, "saturated"),
        "served_well": (limits, "served_well"),
    }
    for load, rows in loads.items():
        tables |= {f"{measure} at {load}": (rows, measure) for measure in ("p50", "p99")}
    claims: dict[str, Any] = {}
    for name, (rows, measure) in tables.items():
        choose = min if measure in ("p50", "p99") else max
        best = choose(settings.baselines, key=lambda policy: rows[policy][measure])
        ours, theirs = rows[settings.policy], rows[best]
        pairs = list(zip(ours[f"{measure}_by_seed"], theirs[f"{measure}_by_seed"], strict=True))
        _, low, high = bootstrap(pairs)
        claims[name] = [ours[measure] / max(theirs[measure], 1e-9), low, high, best]
    return claims
