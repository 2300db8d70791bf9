"""RMD on a Ray cluster of one machine: the same bytes, engines that are killed, scaled in, crowds and who leaves.

Three apps one after the other on one cluster, all on the loopback interface.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rmd.backbones.tiny import tiny_cascades, write_tiny_folder
from rmd.cascade_file import write_cascade_json

# Read as Ray is imported; without it nodes meet at their outside address, on Linux even those of one machine.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  -- else 15, behind whatever else the machine does
ray = pytest.importorskip("ray")

from ray import serve  # noqa: E402

from deploy.ray import app as application  # noqa: E402
from tests.server.weed import free_ports  # noqa: E402
from tests_slow.replicas import Program  # noqa: E402

URL = "/v1/images/generations"
SETTINGS = {
    "backend": "eager", "dtype": "float32", "threads": 1, "max_batch": 1, "measure_teacher": False, "host": "127.0.0.1",
    "serve_teacher": False, "engine_cpus": 0.5, "drain_seconds": 30, "log_level": "warning",
}  # fmt: skip
MANY = 32
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_folder("sd3", tmp_path_factory.mktemp("checkpoints") / "tiny")
    write_cascade_json(folder, backbone="sd3", cascades=tiny_cascades("sd3"), default="2+2")
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray of two CPUs; the address of its proxy."""
    with socket.create_server(("127.0.0.1", 0)) as free, pytest.MonkeyPatch.context() as patch:
        port = free.getsockname()[1]
        patch.setenv("PYTHONPATH", str(ROOT))
        free.close()
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, _node_ip_address="127.0.0.1")
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What `rmd serve` makes of seeds 0 to MANY."""
    folder, (port,) = tmp_path_factory.mktemp("serve"), free_ports(1)
    told = {f"RMD_{name.upper()}": str(value) for name, value in SETTINGS.items() if name != "engine_cpus"}
    told |= {"RMD_CHECKPOINT": str(checkpoint), "RMD_PORT": str(port), "RMD_VIDEOS": str(folder / "videos")}
    command = [sys.executable, "-c", "from cli.main import main; main()", "serve", "--no-build"]
    server = Program(
        command, {**told, "PYTHONPATH": str(ROOT)}, folder / "log", f"http://127.0.0.1:{port}/health/ready"
    )
    try:
        server.start()
        return pictures(draw_all(f"http://127.0.0.1:{port}"))
    finally:
        server.kill()


@pytest.fixture(scope="module")
def fixed(undisturbed: list[str], cluster: str, checkpoint: Path) -> str:
    """Two engines behind one front with a short queue. `undisturbed` comes first, before Ray takes the CPUs."""
    serve.run(
        application.build(
            {**SETTINGS, "checkpoint": checkpoint, "min_engines": 2, "max_engines": 2, "queue_items": MANY}
        )
    )
    until_engines(cluster, 2)
    return cluster


def until(condition: Callable[[], Any], what: str, seconds: float = 180) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.05)
    return found


def ready_engines(url: str) -> list[str]:
    body = httpx.get(f"{url}/health/ready", timeout=30).json()
    return sorted(each["device"] for each in body.get("engines", []) if each["status"] == "ready")


def until_engines(url: str, count: int) -> list[str]:
    return until(lambda: len(names := ready_engines(url)) == count and names, f"{count} engines")


def engine_processes(name: str = "Engine") -> list[psutil.Process]:
    return [
        each
        for each in psutil.process_iter(["cmdline"])
        if name in " ".join(each.info["cmdline"] or []) and "ray::" in (each.info["cmdline"] or [""])[0]
    ]


def draw(client: httpx.Client, seed: int, **fields: Any) -> httpx.Response:
    return client.post(URL, json={"prompt": "a", "seed": seed, **fields})


def draw_all(url: str, count: int = MANY) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=count)
    with httpx.Client(base_url=url, timeout=180, limits=limits) as client, ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda seed: draw(client, seed), range(count)))


def pictures(replies: list[httpx.Response]) -> list[str]:
    assert Counter(reply.status_code for reply in replies) == {200: len(replies)}
    return [reply.json()["data"][0]["b64_json"] for reply in replies]


def metric(url: str, name: str, **labels: str) -> float:
    """The sum over all fronts, as Prometheus would find and scrape them."""
    (group,) = httpx.get(f"{url}/metrics/targets", timeout=30).json()
    return sum(
        sample.value
        for target in group["targets"]
        for family in text_string_to_metric_families(httpx.get(f"http://{target}/metrics", timeout=30).text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_the_same_bytes_as_rmd_serve(fixed: str, undisturbed: list[str]) -> None:
    assert pictures(draw_all(fixed)) == undisturbed
    assert metric(fixed, "rmd_pictures_total") == MANY and metric(fixed, "rmd_steps_total") == 4 * MANY


def test_an_engine_killed_in_the_middle_costs_no_accepted_request(fixed: str, undisturbed: list[str]) -> None:
    before, engines = metric(fixed, "rmd_pictures_total"), until_engines(fixed, 2)
    with ThreadPoolExecutor(1) as pool:
        calls = pool.submit(draw_all, fixed)
        until(lambda: metric(fixed, "rmd_pictures_total") > before, "the first of them")
        assert metric(fixed, "rmd_in_flight_items") > 2, "and others not"
        victim = engine_processes()[0]
        os.kill(victim.pid, signal.SIGKILL)
        assert pictures(calls.result(180)) == undisturbed, "the same to the bit"
    assert set(until(lambda: set(ready_engines(fixed)) - set(engines), "Ray's new engine")) and until_engines(fixed, 2)


def test_a_crowd_gets_our_429_and_retry_after(fixed: str) -> None:
    replies = draw_all(fixed, 4 * MANY)
    statuses = Counter(reply.status_code for reply in replies)
    assert set(statuses) == {200, 429} and statuses[200] >= MANY, statuses
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert refused.json()["error"]["code"] == "queue_full" and int(refused.headers["retry-after"]) >= 1


def test_who_leaves_takes_the_work_along(fixed: str) -> None:
    until(lambda: metric(fixed, "rmd_in_flight_items") == 0, "an empty house")
    before = metric(fixed, "rmd_steps_total")
    with httpx.Client(base_url=fixed, timeout=60) as client:
        for seed in range(8):
            with client.stream(
                "POST", URL, json={"prompt": "b", "seed": seed, "n": 4, "stream": True, "partial_images": 1}
            ) as reply:
                assert reply.status_code == 200
                next(reply.iter_bytes())  # and away
    until(lambda: metric(fixed, "rmd_in_flight_items") == 0, "nobody's work")
    assert metric(fixed, "rmd_dropped_items_total", outcome="client_gone") > 0
    assert metric(fixed, "rmd_steps_total") - before < 8 * 4 * 4, "it was not made to the end"


def test_engines_come_with_work_and_go_without_costing_a_stream(
    cluster: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application, "_SCALE_IN_SECONDS", 2.0)
    serve.run(application.build({**SETTINGS, "checkpoint": checkpoint, "max_engines": 2, "engine_seconds": 0.2}))
    first = until_engines(cluster, 1)
    end = time.monotonic() + 240
    while len(ready_engines(cluster)) < 2:  # work for more than one
        pictures(draw_all(cluster))
        assert time.monotonic() < end, "never came: the second engine"
    leaving: list[str] = []
    with httpx.Client(base_url=cluster, timeout=60) as client:
        while len(ready_engines(cluster)) > 1:  # one stream after the other, on whichever engine
            stream = draw(client, 1, stream=True, partial_images=1)
            assert (
                stream.status_code == 200 and "image_generation.completed" in stream.text and "error" not in stream.text
            )
            leaving.append(stream.text)
            assert time.monotonic() < end + 120, "never went: the second engine"
        assert len(set(leaving)) >= 1 and draw(client, 2).status_code == 200
    assert first and metric(cluster, "rmd_dropped_items_total") == 0


def test_stages_apart_an_engine_killed_between_hand_over_and_decoding(
    cluster: str, checkpoint: Path, undisturbed: list[str]
) -> None:
    pools = {"pools": "low:1,high:1,decode:1", "engine_cpus": 0.3}
    serve.run(application.build({**SETTINGS, **pools, "checkpoint": checkpoint}))
    until_engines(cluster, 3)
    assert pictures(draw_all(cluster)) == undisturbed, "the bytes of whole cascades"
    assert metric(cluster, "rmd_steps_total") == 4 * MANY
    (victim,) = engine_processes("Engine-decode")
    victim.suspend()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(draw_all, cluster, 4)
        until(lambda: metric(cluster, "rmd_steps_total") == 4 * MANY + 16, "the last of their steps")
        until(lambda: metric(cluster, "rmd_queue_depth", station="decode 64x64") == 4, "the hand-overs")
        victim.kill()
        assert pictures(call.result(180)) == undisturbed[:4], "the same to the bit"
    assert metric(cluster, "rmd_steps_total") == 4 * MANY + 16, "no step was run again"
    until_engines(cluster, 3)
