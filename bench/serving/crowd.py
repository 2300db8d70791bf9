"""``rmd bench crowd``: many times what the server can do, each request on a connection of its own, none sent again."""

from __future__ import annotations

import os
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.serving.measures import percentile
from bench.serving.outcomes import Outcome, whole_rate
from bench.serving.servers import Server, plain, start_ours
from bench.serving.traces import make_trace

_ALONE, _AFTER = 24, 96  # pictures, one at a time
_CLIENTS = 16


@dataclass(frozen=True)
class CrowdSettings:
    """What is measured.

    Attributes:
        times: requests a second, over what the server makes.
        seconds: of the crowd.
    """

    checkpoint: Path = Path("models/embedded")
    engines: Path = Path("engines-cache")
    mix: str = "2+2"
    times: float = 10.0
    seconds: float = 90.0
    saturated: int = 320


def run_crowd(settings: CrowdSettings, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure it; see :func:`crowd_markdown`."""
    say("starting rmd serve")
    told = {"measure_teacher": "false", "serve_teacher": "false", "log_level": "error"}
    server = start_ours(settings.checkpoint, settings.engines, os.environ, **told)
    try:
        server.wait_until_ready()
        say("one at a time, and as much as it can")
        alone = [o.latency for o in server.play(make_trace(settings.mix, 1.0, _ALONE, 1), 1)]
        capacity = whole_rate(server.play(make_trace(settings.mix, 1.0, settings.saturated, 2), _CLIENTS, fresh=True))
        rate = settings.times * capacity
        say(f"{rate:.0f} requests a second for {settings.seconds:g} s")
        probe = _Probe(server)
        trace = make_trace(settings.mix, rate, round(rate * settings.seconds), 3)
        outcomes = server.play(trace, fresh=True)
        over = time.monotonic()
        probe.stop()
        say("after the crowd")
        late = time.monotonic() - over
        newcomers = [(late + o.sent, o.latency) for o in server.play(make_trace(settings.mix, 1.0, _AFTER, 4), 1)]
    finally:
        server.end()
    usual = percentile(alone, 0.5)
    return {
        "format": 1,
        "kind": "crowd",
        "settings": plain(settings),
        "alone": usual,
        "capacity": capacity,
        "sent": len(outcomes),
        **_figures(outcomes, settings.seconds, capacity),
        "live_p99": percentile(probe.latencies, 0.99),
        "newcomers": newcomers,
        "usual_again_after": next((at for at, took in newcomers if took <= 2 * usual), None),
    }


def _figures(outcomes: list[Outcome], seconds: float, capacity: float) -> dict[str, Any]:
    made = [outcome for outcome in outcomes if outcome.status == 200]
    refused = [outcome.finished - outcome.sent for outcome in outcomes if outcome.status == 429]
    within = sum(outcome.finished <= seconds for outcome in made)
    return {
        "statuses": {str(status): count for status, count in sorted(Counter(o.status for o in outcomes).items())},
        "goodput": within / seconds / capacity,
        "made_p50": percentile((outcome.latency for outcome in made), 0.5),
        "made_p99": percentile((outcome.latency for outcome in made), 0.99),
        "refused_p50": percentile(refused, 0.5),
        "refused_p99": percentile(refused, 0.99),
    }


class _Probe:
    """Asks for ``/health/live`` ten times a second until stopped."""

    def __init__(self, server: Server) -> None:
        self.latencies: list[float] = []
        self._url = f"http://127.0.0.1:{server.port}/health/live"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(0.1):
            since = time.monotonic()
            with urllib.request.urlopen(self._url, timeout=60):
                self.latencies.append(time.monotonic() - since)


def crowd_markdown(content: dict[str, Any]) -> str:
    """Return the report."""
    settings, after = content["settings"], content["usual_again_after"]
    return "\n".join(
        [
            "# A crowd",
            "",
            f"Written by `rmd bench crowd`: {settings['times']:g} times the capacity for {settings['seconds']:g} s, "
            "each request on a connection of its own, none sent again, from a process on the same cores.",
            "",
            "| | |",
            "| --- | ---: |",
            f"| capacity, pictures/s | {content['capacity']:.1f} |",
            f"| sent | {content['sent']} |",
            *(f"| of them {status} | {count} |" for status, count in content["statuses"].items()),
            f"| pictures made, over capacity | {content['goodput']:.2f} |",
            f"| a picture: p50, p99, s | {content['made_p50']:.2f}, {content['made_p99']:.2f} |",
            f"| alone: p50, s | {content['alone']:.2f} |",
            f"| a refusal: p50, p99, ms | {1e3 * content['refused_p50']:.0f}, {1e3 * content['refused_p99']:.0f} |",
            f"| `/health/live` p99, ms | {1e3 * content['live_p99']:.0f} |",
            f"| a newcomer waits as usual again after, s | {'never' if after is None else f'{after:.1f}'} |",
        ]
    )
