"""More than can be drawn in time: refused at once, not after its deadline."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
from openai import OpenAI

from server.core.costs import CostTable
from server.device.model import DeviceModel
from tests.server.conftest import make_settings
from tests.server.house import URL, serving

CROWD = 200
SECONDS = 0.05  # of every batch, each of one picture


def test_what_cannot_be_ready_in_time_is_refused_at_once(checkpoint: Path, model: DeviceModel) -> None:
    model.costs = CostTable({key: {1: SECONDS} for key in model.card.stations()})
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


def test_what_no_wait_could_help_says_so(checkpoint: Path, model: DeviceModel) -> None:
    model.costs = CostTable({key: {1: SECONDS} for key in model.card.stations()})
    with serving(model, make_settings(checkpoint, deadline_seconds=1)) as house:
        assert house.draw(n=2).status_code == 200
        reply = house.draw(n=8)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "n" and reply.json()["error"]["code"] == "takes_too_long"
    assert "may take 1 s; ask for less" in reply.json()["error"]["message"]


def test_the_text_counts_too(checkpoint: Path, model: DeviceModel) -> None:
    model.costs = CostTable({key: {1: 2.0 if key.kind == "encode" else 0.001} for key in model.card.stations()})
    with serving(model, make_settings(checkpoint, deadline_seconds=1)) as house:
        assert house.draw().json()["error"]["code"] == "takes_too_long"


def test_a_machine_in_a_bad_mood_refuses_for_now_and_not_for_good(checkpoint: Path, model: DeviceModel) -> None:
    """After nine slow batches the same request got 400 and x-should-retry: false."""
    with serving(model, make_settings(checkpoint, deadline_seconds=5)) as house:
        assert house.draw(n=4).status_code == 200
        for key in model.card.stations():
            for _ in range(9):
                house.service.costs.observe(key, 1, 3.0)
        house.gate.close()
        ahead = house.in_background(house.draw)
        house.until_waiting(1)
        slow = house.draw(n=4)
        house.gate.open()
        assert slow.status_code == 429 and int(slow.headers["retry-after"]) >= 1
        assert "x-should-retry" not in slow.headers
        assert ahead.result().status_code == 200
        house.until_idle()
        assert house.draw(n=4).status_code == 200, "in an empty house it is tried: nothing else would teach the table"


def test_a_crowd_of_official_clients_is_served_with_their_default_retries(checkpoint: Path, model: DeviceModel) -> None:
    """All 200 were told one second, and 116 of them ended in RateLimitError."""
    model.costs = CostTable(model.costs.table())  # which learns: a promise is worth what the estimates are
    with serving(model, make_settings(checkpoint, max_batch=2)) as house:
        limits = httpx.Limits(max_connections=CROWD)
        with httpx.Client(timeout=120, limits=limits) as shared, ThreadPoolExecutor(CROWD) as pool:
            clients = [OpenAI(base_url=f"{house.url}/v1", api_key="x", http_client=shared) for _ in range(CROWD)]
            start = threading.Barrier(CROWD)

            def draw(client: OpenAI) -> str:
                start.wait(60)
                try:
                    client.images.generate(prompt="a")
                except openai.APIStatusError as error:
                    return str(error.status_code)
                return "done"

            assert Counter(pool.map(draw, clients)) == {"done": CROWD}
        assert house.metric("rmd_requests_total", outcome="queue_full") > 50, "they did not all fit at once"
