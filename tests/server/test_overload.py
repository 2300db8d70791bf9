"""More than can be drawn in time: refused at once, not after its deadline."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from server.core.latency import LatencyTable
from server.device.model import ServedModel
from tests.server.conftest import make_settings
from tests.server.house import URL, serving

SECONDS = 0.05  # of every batch, each of one picture


def test_what_cannot_be_ready_in_time_is_refused_at_once(checkpoint: Path, model: ServedModel) -> None:
    model.latencies = LatencyTable({key: {1: SECONDS} for key in model.stations()})
    with serving(model, make_settings(checkpoint, deadline_seconds=3)) as house:
        house.gate.before = lambda component, size, inputs: time.sleep(SECONDS * (component != "text_encoder"))
        limits = httpx.Limits(max_connections=64)
        with httpx.Client(base_url=house.url, timeout=30, limits=limits) as client, ThreadPoolExecutor(40) as pool:
            bodies = [{"prompt": str(number), "schedule": "0+4"} for number in range(40)]
            replies = list(pool.map(lambda body: client.post(URL, json=body), bodies))
    counts = Counter(reply.status_code for reply in replies)
    # Of 40 a dozen fit into 3 s at the most; without the refusal most of the others would get 504, after 3 s.
    assert counts[429] >= 20 and counts[200] >= 1, counts
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies if reply.status_code == 429)


def test_what_no_wait_could_help_says_so(checkpoint: Path, model: ServedModel) -> None:
    model.latencies = LatencyTable({key: {1: SECONDS} for key in model.stations()})
    with serving(model, make_settings(checkpoint, deadline_seconds=1)) as house:
        assert house.draw(n=2).status_code == 200
        reply = house.draw(n=8)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "n" and reply.json()["error"]["code"] == "takes_too_long"
    assert "may take 1 s; ask for less" in reply.json()["error"]["message"]
