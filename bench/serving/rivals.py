"""``rmd bench serve --against litserve``: two whole HTTP servers over the same engines, turn about.

Whichever is not measured is stopped (SIGSTOP), since an idle server may poll and so slow its rival on the same cores.
Each round starts both anew: where a process's memory came to lie makes it a tenth quicker or slower for as long as it
lives, so rounds of the same two processes would measure that again and again.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.serving.measures import bootstrap, percentile
from bench.serving.outcomes import Outcome, whole_rate
from bench.serving.servers import OURS, ROOT, Server, free_port, plain, start_ours
from bench.serving.traces import make_trace
from server.front.engine import memory_policy, thread_policy

THEIRS = "litserve"
_NOISE = 0.02
"""Of a saturation of the sweep."""

Rounds = dict[str, dict[str, list[dict[str, float]]]]
"""Each round's figures, by load and server."""


@dataclass(frozen=True)
class RivalSettings:
    """What is measured.

    Attributes:
        sizes: of the rival's batches; the one with the best saturation is measured, with the best of ``windows``: the
            shortest of those that saturate alike.
        loads: shares of the rival's saturation.
        workers: the rival's processes, each with its part of the threads; engines for so many threads are to be there.
        rounds: each with a trace of its own, both servers in random order.
        clients: of the closed loop that saturation is measured with.
        warm: requests to a server that has stood still, before it is measured: a machine takes memory away meanwhile.
        packages: folder that the rival's package is imported from, where it is not installed.
    """

    checkpoint: Path = Path("models/embedded")
    engines: Path = Path("engines-cache")
    backend: str = "auto"
    threads: int | None = None
    mix: str = "2+2"
    sizes: tuple[int, ...] = (8, 4)
    windows: tuple[float, ...] = (0.0, 0.02)
    fast_queue: bool = False
    workers: int = 1
    loads: tuple[float, ...] = (0.3, 0.6, 0.8, 0.95)
    rounds: int = 6
    count: int = 120
    saturated: int = 160
    clients: int = 32
    warm: int = 48
    packages: Path | None = None


def run_rivals(
    settings: RivalSettings,
    say: Callable[[str], None] = lambda _: None,
    on_round: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure both; see :func:`bench.serving.report.rivals_markdown`.

    Args:
        on_round: told what has been found after each round, as it is returned in the end.
    """

    def content(rounds: Rounds, best: str) -> dict[str, Any]:
        told = {**plain(settings), "rounds": len(rounds["saturated"][OURS])}
        del told["packages"]
        loads = _compared(rounds)
        return {"format": 1, "kind": "rivals", "settings": told, "sweep": sweep, "rival": best, "loads": loads}

    sweep: dict[str, float] = {}
    for size in settings.sizes:
        for window in settings.windows:
            say(f"litserve at {size}, {window:g} s")
            with _running(partial(_start_theirs, settings, size, window)) as (server,):
                server.go_on()
                server.play(make_trace(settings.mix, 1.0, settings.clients, 999), settings.clients)
                sweep[f"{size}:{window:g}"] = fmean(_saturated(server, settings, seed) for seed in (100, 101))
    best = best_setting(sweep)
    best_size, best_window = best.split(":")
    rounds: Rounds = {}
    for number in range(settings.rounds):
        say(f"round {number + 1} of {settings.rounds}: starting both, litserve at its best, {best}")
        starts = partial(_start_ours, settings), partial(_start_theirs, settings, int(best_size), float(best_window))
        with _running(*starts) as servers:
            _play_round(number, rounds, settings, servers, sweep[best], say)
        on_round(content(rounds, best))
    return content(rounds, best)


@contextmanager
def _running(*starts: Callable[[], Server]) -> Iterator[list[Server]]:
    """Start servers, one after the other; they are ready and stand still."""
    with ExitStack() as stack:
        servers = []
        for start in starts:
            server = start()
            stack.callback(server.end)
            server.wait_until_ready()
            server.stand_still()
            servers.append(server)
        yield servers


def best_setting(sweep: Mapping[str, float]) -> str:
    """The rival's best size and window: of those that make as much, but for noise, the shortest window, which costs
    a lone request least."""
    level = [name for name, rate in sweep.items() if rate >= (1 - _NOISE) * max(sweep.values())]
    return min(level, key=lambda name: (float(name.split(":")[1]), -sweep[name]))


def _play_round(
    number: int,
    found: Rounds,
    settings: RivalSettings,
    servers: Sequence[Server],
    top: float,
    say: Callable[[str], None],
) -> None:
    """Measure every server once at every load, and add it to ``found``."""
    for load in ("saturated", *settings.loads):
        order = list(servers)
        random.Random(f"{number} {load}").shuffle(order)
        for server in order:
            say(f"round {number + 1} of {settings.rounds}, {load}, {server.name}")
            server.go_on()
            server.play(make_trace(settings.mix, 1.0, settings.warm, 998), settings.clients)
            if isinstance(load, float):
                outcomes = server.play(make_trace(settings.mix, load * top, settings.count, number))
                figures = _figures(outcomes)
            else:
                figures = {"rate": _saturated(server, settings, number)}
            server.stand_still()
            name = load if isinstance(load, str) else f"{load:g}"
            found.setdefault(name, {}).setdefault(server.name, []).append(figures)


def _saturated(server: Server, settings: RivalSettings, seed: int) -> float:
    trace = make_trace(settings.mix, 1.0, settings.saturated, seed)
    return whole_rate(server.play(trace, settings.clients))


def _figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    latencies = [outcome.latency for outcome in outcomes]
    last = max(outcome.finished for outcome in outcomes)
    figures = {"rate": sum(outcome.status == 200 for outcome in outcomes) / last}
    return figures | {f"p{round(100 * s)}": percentile(latencies, s) for s in (0.5, 0.95, 0.99)}


def _compared(rounds: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, Any]:
    """Each figure's mean over rounds, by server, and ours over theirs with its interval."""
    compared: dict[str, Any] = {}
    for load, servers in rounds.items():
        rows: dict[str, Any] = {}
        for name in servers[OURS][0]:
            pairs = [(a[name], b[name]) for a, b in zip(servers[OURS], servers[THEIRS], strict=True)]
            finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
            rows[name] = {
                OURS: fmean([ours for ours, _ in pairs]),
                THEIRS: fmean([theirs for _, theirs in pairs]),
                "ratio": list(bootstrap(finite)) if finite else None,
                "rounds": pairs,
            }
        compared[load] = rows
    return compared


def _start_ours(settings: RivalSettings) -> Server:
    told = {
        # Neither refuses anything, and a server that was stopped for long is not mended.
        "queue_items": "4096",
        "queue_megapixels": "100000",
        "deadline_seconds": "600",
        "watchdog_seconds": "1000000",
        "prompt_megabytes": "0",  # prompts come again at the next load, and the rival keeps none
        "backend": settings.backend,
        "measure_teacher": "false",
        "serve_teacher": "false",
        "log_level": "warning",
    }
    if settings.threads is not None:
        told["threads"] = str(settings.threads)
    return start_ours(settings.checkpoint, settings.engines, os.environ, **told)


def _start_theirs(settings: RivalSettings, size: int, window: float) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "bench.serving.litserve_app", "--port", str(port)]
    command += ["--checkpoint", str(settings.checkpoint), "--engines", str(settings.engines)]
    command += ["--backend", settings.backend, "--batch", str(size), "--window", str(window)]
    threads = settings.threads
    if settings.workers > 1:
        threads = max((threads or len(os.sched_getaffinity(0))) // settings.workers, 1)
        command += ["--workers", str(settings.workers)]
    command += ["--threads", str(threads)] if threads is not None else []
    command += ["--fast-queue"] if settings.fast_queue else []
    return Server(THEIRS, command, port, _environment(settings))


def _environment(settings: RivalSettings) -> dict[str, str]:
    """Return the rival's: its threads and its memory behave as our engine's do."""
    found = {**thread_policy(os.environ), **memory_policy(os.environ, "cpu"), **os.environ}
    paths = [str(ROOT), *([str(settings.packages)] if settings.packages else [])]
    found["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    return found
