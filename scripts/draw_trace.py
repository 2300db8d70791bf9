"""Draws docs/trace.png: one request's trace, and the batches that it shared with others, from a real run.

python scripts/draw_trace.py docs/trace.png

Starts a server of models/embedded with tracing, eager, and a receiver; asks for three pictures at nearly one moment,
one of them by another schedule. Needs the extras `otel` and `train` (matplotlib).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import matplotlib

from bench.otlp import OtlpReceiver, ReceivedSpan

matplotlib.use("Agg")
from matplotlib import pyplot

PORT = 8457
ASKED = (
    ("red apple, noto style", "2+2", 0.0),
    ("rocket, noto style", "2+2", 0.012),
    ("snowman, noto style", "0+4", 0.03),
)
UNSAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
COLOURS = {"queue": "#d9d9d9", "encode": "#55a868", "step": "#4c72b0", "decode": "#dd8452", "package": "#8172b3"}
OTHER = "#8c8c8c"


def record() -> list[ReceivedSpan]:
    """Serve, ask, stop; return every span."""
    settings = {"RMD_TRACING": "true", "RMD_MEASURE_TEACHER": "false", "RMD_SERVE_TEACHER": "false"}
    with OtlpReceiver() as receiver:
        command = [sys.executable, "-m", "cli.main", "serve", "--checkpoint", "models/embedded"]
        server = subprocess.Popen(
            [*command, "--backend", "eager", "--no-build", "--port", str(PORT)],
            env={**os.environ, **settings, "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint},
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=120) as client:
                _wait(client, server)
                for prompt, schedule, _ in ASKED * 2:  # what is first is slow: no part of the picture
                    _ask(client, f"warm, {prompt}", schedule, 0.0, {"traceparent": UNSAMPLED})
                with ThreadPoolExecutor(len(ASKED)) as pool:
                    list(pool.map(lambda asked: _ask(client, *asked, {}), ASKED))
        finally:
            server.terminate()
            server.wait(60)
        return receiver.spans


def _wait(client: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            if client.get("/health/ready").status_code == 200:
                return
        except httpx.ConnectError:
            pass
        time.sleep(0.2)
    raise SystemExit("the server ended")


def _ask(client: httpx.Client, prompt: str, schedule: str, delay: float, headers: dict[str, str]) -> None:
    time.sleep(delay)
    body = {"prompt": prompt, "schedule": schedule, "seed": 1}
    client.post("/v1/images/generations", json=body, headers=headers).raise_for_status()


def draw(spans: list[ReceivedSpan], path: Path) -> None:
    """Draw the requests' spans as bars by time; above them the batches, joined to their members."""
    roots = sorted((s for s in spans if s.name.startswith("POST ")), key=lambda span: span.start)
    batches = sorted((s for s in spans if s.name.startswith("batch ")), key=lambda span: span.start)
    by_id = {span.id: span for span in spans}
    zero = roots[0].start
    figure, axes = pyplot.subplots(figsize=(14, 7))
    rows: list[str] = []
    places: dict[str, int] = {}

    def bar(span: ReceivedSpan, row: int, colour: str, height: float = 0.7) -> None:
        places[span.id] = row
        axes.barh(row, (span.end - span.start) / 1e6, left=(span.start - zero) / 1e6, height=height, color=colour)

    for batch in batches:
        bar(batch, 0, "#c44e52", 0.9)
        middle = ((batch.start + batch.end) / 2 - zero) / 1e6
        axes.text(
            middle, 0, str(batch.attributes["rmd.batch.company"]), ha="center", va="center", color="white", fontsize=8
        )
    rows.append("batches (how many together)")
    for root in roots:
        own = sorted((s for s in spans if s.trace == root.trace), key=lambda span: span.start)
        picture = next(s for s in own if s.name == "picture 0")
        label = f"{root.name} ({picture.attributes['rmd.schedule']})"
        for name, group in (
            (label, [root]),
            ("admission, reply", [s for s in own if s.name in ("admission", "reply")]),
            ("queue, encode, steps, decode, package", [s for s in own if s.parent == picture.id]),
        ):
            for span in group:
                bar(span, len(rows), COLOURS.get(span.name.split()[0], OTHER))
                if span.name.startswith("step"):
                    middle = ((span.start + span.end) / 2 - zero) / 1e6
                    axes.text(
                        middle,
                        len(rows),
                        span.attributes["rmd.station"],
                        ha="center",
                        va="center",
                        color="white",
                        fontsize=6,
                    )
                if "hand-over" in span.events:
                    axes.plot((span.start - zero) / 1e6, len(rows) - 0.45, marker="v", color="black", markersize=5)
            rows.append(name)
    for batch in batches:
        for member in (by_id[link] for link in batch.links if link in by_id):
            at = (batch.start - zero) / 1e6
            axes.plot([at, at], [0.45, places[member.id] - 0.35], color="#c44e52", linewidth=0.5, alpha=0.5)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes.legend(handles, list(COLOURS), loc="lower right", frameon=False, ncols=len(COLOURS), bbox_to_anchor=(1, 1))
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds since the first request came; triangle: hand-over to the full size")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(record(), Path(sys.argv[1]))
