"""``rmd bench pools --live``: two real engines of one thread each, whole or with stages apart, beside the simulator.

Whole HTTP servers turn about, whichever is not measured stopped. The simulator is given what the engines themselves
measured when they started, and plays the same traces.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.serving.live import wait_until_ready
from bench.serving.measures import bootstrap
from bench.serving.outcomes import whole_rate
from bench.serving.pools import LAYOUTS, simulate_cluster
from bench.serving.servers import Server, plain, start_ours
from bench.serving.tables import Machine
from bench.serving.traces import make_trace
from engines.errors import EngineMissing
from server.front.engine import EngineProcess
from server.start.settings import ServerSettings

WHOLE = "whole"
STAGES_OF = {WHOLE: "all,all", "low, high": "low,high+decode", "decode apart": "low+high,decode"}
"""What `bench.serving.pools.LAYOUTS` names, as ``--stages`` has it; text is encoded where it is needed."""
_THREADS = 1
_TOLD = {
    "measure_teacher": "false",
    "serve_teacher": "false",
    "prompt_megabytes": "0",
    "build_missing": "false",  # a builder beside it would be measured too
    "watchdog_seconds": "1000000",  # a server that was stopped for long is not mended
    "deadline_seconds": "600",
    "log_level": "error",
}


@dataclass(frozen=True)
class PoolLiveSettings:
    """What is measured.

    Attributes:
        rounds: each with a trace of its own, the layouts in random order.
        saturated: requests of a run.
        clients: with a request on its way each.
    """

    checkpoint: Path = Path("models/embedded")
    engines: Path = Path("engines-cache")
    mix: str = "2+2"
    rounds: int = 5
    saturated: int = 96
    clients: int = 32


def run_pools_live(settings: PoolLiveSettings, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure every layout; see :func:`pools_live_markdown`.

    Raises:
        EngineGoneError, RuntimeError: an engine or a server does not get ready.
        EngineMissing: engines for one thread are missing; the message says how they are built.
    """
    machine = _machine(settings, say)
    servers = dict[str, Server]()
    real: dict[str, list[float]] = {name: [] for name in STAGES_OF}
    told: dict[str, list[float]] = {name: [] for name in STAGES_OF}
    try:
        for name, stages in STAGES_OF.items():
            say(f"starting {stages}")
            servers[name] = start_ours(
                settings.checkpoint,
                settings.engines,
                os.environ,
                devices="cpu,cpu",
                stages=stages,
                threads=str(_THREADS),
                **_TOLD,
            )
            servers[name].wait_until_ready()
            servers[name].stand_still()
        for number in range(settings.rounds):
            trace = make_trace(settings.mix, 1.0, settings.saturated, number)
            order = list(servers)
            random.Random(number).shuffle(order)
            for name in order:
                say(f"round {number + 1} of {settings.rounds}, {name}")
                servers[name].go_on()
                servers[name].play(make_trace(settings.mix, 1.0, settings.clients, 999), settings.clients)  # it stood
                real[name].append(whole_rate(servers[name].play(trace, settings.clients)))
                servers[name].stand_still()
                layout = LAYOUTS[name]
                devices = [1] * len(layout) if len(layout) > 1 else [2]
                run = simulate_cluster(machine, "stagewise", trace, layout, devices, clients=settings.clients)
                told[name].append(whole_rate(run.outcomes))
    finally:
        for server in servers.values():
            server.end()
    return {
        "format": 1,
        "kind": "pools live",
        "settings": plain(settings),
        "rates": real,
        "simulated": told,
        "ratios": {name: list(bootstrap(list(zip(real[name], real[WHOLE], strict=True)))) for name in STAGES_OF},
        "simulated_ratios": {name: fmean(told[name]) / fmean(told[WHOLE]) for name in STAGES_OF},
    }


def _machine(settings: PoolLiveSettings, say: Callable[[str], None]) -> Machine:
    """The model, and what its batches cost on one thread while the other core rests."""
    server = ServerSettings(
        checkpoint=settings.checkpoint,
        engines=settings.engines,
        threads=_THREADS,
        measure_teacher=False,
        serve_teacher=False,
        build_missing=False,
        log_level="error",
    )
    engine = EngineProcess.start(server, "cpu")
    try:
        ready = wait_until_ready(engine, say)
    finally:
        engine.stop()
        engine.close()
    card = ready.cards[0]
    if not card.complete or any(not card.compiled.get(key.label) for key in card.stations()):
        raise EngineMissing(
            f"{settings.engines} lacks engines of {settings.checkpoint} for one thread, and eager is not compared: "
            f"rmd build --checkpoint {settings.checkpoint} --engines {settings.engines} --threads {_THREADS}"
        )
    costs = {key: {w: s for k, w, s in ready.costs if k == key} for key, _, _ in ready.costs}
    return Machine("here", "", card, costs)


def pools_live_markdown(content: Mapping[str, Any]) -> str:
    """Return the report."""
    from bench.serving.report import markdown_table

    settings = content["settings"]
    lines = [
        "# Whole replicas or pools, on real engines",
        "",
        f"Written by `rmd bench pools --live`: two engines of one thread each on two cores, {settings['mix']}, whole "
        f"HTTP servers turn about, {settings['rounds']} rounds of {settings['saturated']}, {settings['clients']} "
        "requests always on their way, the servers that are not measured stopped. The simulator is given what an "
        "engine measured of itself at its start, alone on the machine, and plays the same traces; it knows of no "
        "front, no client and no memory that engines share. In brackets: 95 % intervals, bootstrap over rounds.",
        "",
    ]
    rows = [
        [
            name,
            f"`{STAGES_OF[name]}`",
            f"{fmean(rates):.2f}",
            ", ".join(f"{rate:.2f}" for rate in rates),
            f"{fmean(content['simulated'][name]):.2f}",
            "{:.2f} ({:.2f} to {:.2f})".format(*content["ratios"][name]),
            f"{content['simulated_ratios'][name]:.2f}",
        ]
        for name, rates in content["rates"].items()
    ]
    head = ["layout", "`--stages`", "pictures/s", "by round", "simulated", "over whole replicas", "simulated"]
    return "\n".join([*lines, *markdown_table(head, rows, left=2)])
