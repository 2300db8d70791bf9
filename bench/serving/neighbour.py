"""``rmd bench neighbour``: a picture's seconds beside other work on the same cores, by how OpenMP's threads wait.

Two servers that differ in nothing else take turns; whichever is not measured is stopped. By default threads spin for
long, and a spinning thread takes its core from the very work that it waits for.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.serving.measures import bootstrap
from bench.serving.servers import plain, start_ours
from bench.serving.traces import make_trace

WAITING: Mapping[str, Mapping[str, str]] = {
    "ours": {},
    "openmp": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},
}
"""What the environment says of waiting: nothing, which leaves it to the server; or what OpenMP does unasked."""

_KNOBS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@dataclass(frozen=True)
class NeighbourSettings:
    """What is measured.

    Attributes:
        neighbours: processes that never rest, by case.
        count: pictures, one at a time, of a server, case and round.
    """

    checkpoint: Path = Path("models/embedded")
    engines: Path = Path("engines-cache")
    mix: str = "2+2"
    neighbours: tuple[int, ...] = (0, 1)
    rounds: int = 5
    count: int = 20


def run_neighbour(settings: NeighbourSettings, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure it; see :func:`neighbour_markdown`."""
    told = {"measure_teacher": "false", "serve_teacher": "false", "log_level": "error", "watchdog_seconds": "1000000"}
    environment = {name: value for name, value in os.environ.items() if name not in _KNOBS}
    servers = {}
    medians: dict[str, dict[str, list[float]]] = {str(n): {name: [] for name in WAITING} for n in settings.neighbours}
    try:
        for name, how in WAITING.items():
            say(f"starting {name}")
            servers[name] = start_ours(settings.checkpoint, settings.engines, {**environment, **how}, **told)
            servers[name].wait_until_ready()
            servers[name].stand_still()
        for number in range(settings.rounds):
            for neighbours in settings.neighbours:
                order = list(servers)
                random.Random(f"{number} {neighbours}").shuffle(order)
                for name in order:
                    say(f"round {number + 1} of {settings.rounds}, {neighbours} neighbour(s), {name}")
                    with _busy(neighbours):
                        servers[name].go_on()
                        outcomes = servers[name].play(make_trace(settings.mix, 1.0, settings.count, number), 1)
                        servers[name].stand_still()
                    medians[str(neighbours)][name].append(median(outcome.latency for outcome in outcomes))
    finally:
        for server in servers.values():
            server.end()
    return {"format": 1, "kind": "neighbour", "settings": plain(settings), "medians": medians}


def neighbour_markdown(content: Mapping[str, Any]) -> str:
    """Return the report."""
    settings = content["settings"]
    lines = [
        "# Beside a neighbour",
        "",
        f"Written by `rmd bench neighbour`: median milliseconds of a picture ({settings['mix']}, one at a time, over "
        f"HTTP), {settings['rounds']} rounds of {settings['count']}; two servers in turns, the other stopped. In "
        "brackets: 95 % interval, bootstrap over rounds.",
        "",
        "| busy processes | as the server waits | as OpenMP waits | ratio |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for neighbours, rows in content["medians"].items():
        ours, theirs = rows["ours"], rows["openmp"]
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*bootstrap(list(zip(ours, theirs, strict=True))))
        lines.append(f"| {neighbours} | {1e3 * median(ours):.0f} | {1e3 * median(theirs):.0f} | {ratio} |")
    return "\n".join(lines)


@contextmanager
def _busy(neighbours: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
