"""Every panel's expression, run on a real Prometheus that scrapes a real server of the embedded models under load."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

ROOT = Path(__file__).parents[1]
LOAD_SECONDS = 75.0  # rates are over a minute
EMPTY = {
    "rmd_device_memory_used_bytes": "no NVIDIA GPU here",
    "rmd_device_power_watts": "no NVIDIA GPU here",
    "rmd_device_utilization_ratio": "no NVIDIA GPU here",
    'kind="compiled"': "all runs eager",
    "rmd_retried_batches_total": "no batch has raised",
}
"""What may return nothing, by a part of the expression, and why."""

pytestmark = [
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus (Debian: prometheus)"),
    pytest.mark.timeout(900),  # its own waits come to 435 s, and say what they waited for
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def until_ok(url: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"{url} never answered")


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[str]:
    """The base URL of a Prometheus that has scraped a server under load, with this project's rules."""
    port, scraper = free_port(), free_port()
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    config["rule_files"] = [str(ROOT / "deploy/prometheus/rules.yml")]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{port}"]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "cli.main", "serve", "--backend", "eager", "--no-build", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RMD_VIDEOS": str(tmp_path / "videos")}
    server = subprocess.Popen(command, cwd=ROOT, env=environment)
    scrape = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{scraper}",
        ],
        stderr=subprocess.DEVNULL,
    )
    stop = threading.Event()
    try:
        until_ok(f"http://127.0.0.1:{port}/health/ready", server, 300)
        until_ok(f"http://127.0.0.1:{scraper}/-/ready", scrape, 60)
        loads = [threading.Thread(target=load, args=(f"http://127.0.0.1:{port}", stop)) for _ in range(2)]
        for each in loads:
            each.start()
        time.sleep(LOAD_SECONDS)
        yield f"http://127.0.0.1:{scraper}"
    finally:
        stop.set()
        for process in (scrape, server):
            process.terminate()
            process.wait(120)


def load(url: str, stop: threading.Event) -> None:
    """Ask for a film, then for pictures of two schedules and a stream with a partial picture, until told to stop."""
    with httpx.Client(base_url=url, timeout=120) as client:
        client.post("/v1/videos", json={"prompt": "red apple, noto style, moving left to right"})
        while not stop.is_set():
            try:
                for schedule in ("2+2", "0+4"):
                    client.post("/v1/images/generations", json={"prompt": "red apple", "schedule": schedule})
                client.post("/v1/images/generations", json={"prompt": "red apple", "stream": True, "partial_images": 1})
            except httpx.TransportError:  # it stops
                return


def test_every_panel_returns_data_or_is_known_to_be_empty(prometheus: str) -> None:
    panels = json.loads((ROOT / "deploy/grafana/dashboards/rmd.json").read_text())["panels"]
    empty, broken = [], []
    for panel in panels:
        for target in panel["targets"]:
            expression = target["expr"].replace("$instance", ".*").replace("$model", ".*")
            reply = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}).json()
            if reply["status"] != "success":
                broken.append((panel["title"], reply.get("error")))
            elif not any(sample["value"][1] != "NaN" for sample in reply["data"]["result"]):
                empty.append((panel["title"], expression))
    assert not broken
    unknown = [each for each in empty if not any(part in each[1] for part in EMPTY)]
    assert not unknown
    print(f"{len(panels)} panels; empty: {[title for title, _ in empty]}")
    rules = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    assert all(rule["health"] == "ok" for group in rules for rule in group["rules"])
    firing = [rule["name"] for group in rules for rule in group["rules"] if rule.get("state") == "firing"]
    assert not firing, "a server that serves raises no alert"
