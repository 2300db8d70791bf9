"""The whole comparison on the simulator: every policy on the same traces, by machine and mix."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from bench.serving.measures import (
    SLOWEST,
    Alone,
    best_rate,
    bootstrap,
    pooled,
    saturations,
    summary,
)
from bench.serving.simulate import World
from bench.serving.tables import MACHINES, machine

BASELINES = (
    "fifo",
    *(f"dynamic:{size}:{window}" for size in (1, 2, 4, 8, 16) for window in ("0", "0.01", "0.05")),
    *(f"continuous:{size}" for size in (1, 2, 4, 8, 16)),
)
"""Each a policy as `server.core.policies.make_policy` reads it: what the rule under test is compared with."""

_LEAST, _MOST = 0.2, 0.98  # shares of a policy's own saturation between which its best rate is looked for


@dataclass(frozen=True)
class StudySettings:
    """What is simulated.

    Attributes:
        policy: the rule under test.
        loads: shares of the best baseline's saturation.
        count: requests of one trace; as many traces as ``seeds``.
        workers: processes.
    """

    machines: tuple[str, ...] = MACHINES
    mixes: tuple[str, ...] = ("2+2", "mix")
    policy: str = "stagewise"
    baselines: tuple[str, ...] = BASELINES
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.85, 0.95)
    arrivals: str = "poisson"
    seeds: tuple[int, ...] = (5, 6, 7, 8, 9)
    count: int = 2000
    world: World = field(default_factory=World)
    workers: int = os.cpu_count() or 1


def run_study(settings: StudySettings, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Simulate everything; see :func:`bench.serving.report.study_markdown` for what comes of it."""
    policies = (settings.policy, *settings.baselines)
    parts = []
    with _map(settings.workers) as each:
        for name in settings.machines:
            for mix in settings.mixes:
                say(f"{name}, {mix}: saturation and the most that is served well")
                limits = dict(zip(policies, each(partial(_limits, settings, name, mix), policies), strict=True))
                best = max(settings.baselines, key=lambda policy: limits[policy]["saturated"])
                top = limits[best]["saturated"]
                loads: dict[str, dict[str, Any]] = {}
                for load in settings.loads:
                    say(f"{name}, {mix}: {load:.0%} of {best}'s saturation")
                    at = each(partial(_at, settings, name, mix, load * top), policies)
                    loads[f"{load:g}"] = dict(zip(policies, at, strict=True))
                parts.append(
                    {"machine": name, "about": machine(name).about, "mix": mix, "limits": limits, "loads": loads}
                    | {"claims": _claims(settings, limits, loads)}
                )
    return {"format": 1, "kind": "simulated", "settings": _plain(settings), "slowest": SLOWEST, "parts": parts}


def _limits(settings: StudySettings, name: str, mix: str, policy: str) -> dict[str, Any]:
    """A policy's saturation, and the most it serves well, over all seeds and by each."""
    known = machine(name)
    each = saturations(known, policy, mix, settings.seeds, settings.count, settings.world)
    top = sum(each) / len(each)
    alone = Alone(known, settings.world)

    def served_well(seeds: Sequence[int], rate: float) -> bool:
        slow: list[float] = []
        for seed in seeds:
            (run,) = pooled(known, policy, mix, rate, [seed], settings.count, settings.arrivals, settings.world)
            slow += alone.slowdowns(run.outcomes)
            if sum(value > SLOWEST for value in slow) > 0.01 * settings.count * len(seeds):
                return False
        return True

    rate = best_rate(partial(served_well, settings.seeds), _LEAST * top, _MOST * top)
    around = (0.4 * rate, 2 * rate) if rate else (_LEAST * top, _MOST * top)
    by_seed = [best_rate(partial(served_well, [seed]), *around) for seed in settings.seeds]
    return {"saturated": top, "saturated_by_seed": each, "served_well": rate, "served_well_by_seed": by_seed}


def _at(settings: StudySettings, name: str, mix: str, rate: float, policy: str) -> dict[str, Any]:
    known = machine(name)
    runs = pooled(known, policy, mix, rate, settings.seeds, settings.count, settings.arrivals, settings.world)
    return {"rate": rate} | summary(runs, Alone(known, settings.world))


def _claims(
    settings: StudySettings, limits: Mapping[str, Any], loads: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The rule under test over the best baseline, by measure: [ratio, low, high, that baseline]."""
    ours = limits[settings.policy]
    claims: dict[str, Any] = {}
    for measure in ("saturated", "served_well"):
        best = max(settings.baselines, key=lambda policy: limits[policy][measure])
        pairs = list(zip(ours[f"{measure}_by_seed"], limits[best][f"{measure}_by_seed"], strict=True))
        _, low, high = bootstrap(pairs)
        claims[measure] = [ours[measure] / max(limits[best][measure], 1e-9), low, high, best]
    for load, rows in loads.items():
        for measure in ("p50", "p99"):
            best = min(settings.baselines, key=lambda policy: rows[policy][measure])
            pairs = list(
                zip(rows[settings.policy][f"{measure}_by_seed"], rows[best][f"{measure}_by_seed"], strict=True)
            )
            _, low, high = bootstrap(pairs)
            ratio = rows[settings.policy][measure] / max(rows[best][measure], 1e-9)
            claims[f"{measure} at {load}"] = [ratio, low, high, best]
    return claims


def _plain(settings: StudySettings) -> dict[str, Any]:
    told = asdict(replace(settings, world=replace(settings.world, truth=None)))
    del told["workers"]
    return told


@contextmanager
def _map(workers: int) -> Iterator[Callable[..., Any]]:
    if workers <= 1:
        yield map
        return
    with ProcessPoolExecutor(workers) as pool:
        yield pool.map
