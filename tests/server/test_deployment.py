"""What is deployed fits the server: metrics and labels of dashboards and alerts, ports, mounts, the time to drain."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.core.faults import OUTCOMES
from server.films.runner import LAST_JOBS_SECONDS
from server.front.service import LAST_BATCH_SECONDS
from server.start.run import LAST_REPLIES_SECONDS
from server.start.settings import ServerSettings
from server.telemetry.machine import gpu_gauges
from server.telemetry.metrics import Metrics
from tests.server.house import URL, House
from tests.server.test_metrics import TwoGpus

ROOT = Path(__file__).parents[2]
SELECTOR = re.compile(r"\b(rmd_\w+)(?:\{([^}]*)\})?")


def read_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def expressions() -> list[str]:
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/rmd.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [rule["expr"] for group in read_yaml("deploy/prometheus/rules.yml")["groups"] for rule in group["rules"]]
    return shown + rules


@pytest.fixture
def labels(house: House) -> dict[str, set[str]]:
    """The labels of every sample that the server shows once it has drawn a picture, refused one and dropped one."""
    assert house.client.post(URL, json={"prompt": "a", "stream": True, "partial_images": 1}).status_code == 200
    house.service.metrics.dropped.labels("deadline")
    house.service.metrics.retried_batches.labels("encode")
    found: dict[str, set[str]] = defaultdict(set)
    films = replace(house.service.snapshot(), video_jobs={"queued": 1})  # what a server of films shows besides
    texts = house.client.get("/metrics").text, Metrics(lambda: films).render()[0].decode()
    shown = [family for text in texts for family in text_string_to_metric_families(text)]
    for family in (*shown, *gpu_gauges(TwoGpus())):
        for sample in family.samples:
            found[sample.name] |= {"instance", "job", *sample.labels}
    return found


def test_dashboards_and_alerts_ask_for_what_the_server_shows(labels: dict[str, set[str]]) -> None:
    asked = expressions()
    assert len(asked) > 20
    for expression in asked:
        names = SELECTOR.findall(expression)
        for name, matchers in names:
            assert name in labels, expression
            assert set(re.findall(r"(\w+)\s*(?:=~|!=|=)", matchers)) <= labels[name], expression
        for grouped in re.findall(r"by \(([^)]*)\)", expression):
            wanted = set(re.split(r",\s*", grouped))
            assert any(wanted <= labels[name] for name, _ in names), expression


def test_engines_that_end_or_stay_down_are_shown_and_raise_alerts() -> None:
    asked = "\n".join(expressions())
    alerts = "\n".join(
        rule["expr"] for group in read_yaml("deploy/prometheus/rules.yml")["groups"] for rule in group["rules"]
    )
    for name in ("rmd_engine_up", "rmd_engine_restarts_total"):
        assert name in alerts and asked.count(name) > alerts.count(name), name
    for name in ("rmd_station_compiled", "rmd_teacher_age_seconds", "rmd_teacher_spread_ratio"):
        assert name in asked


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
@pytest.mark.parametrize(
    "command", ["check rules rules.yml", "check config prometheus.yml", "test rules rules_test.yml"]
)
def test_prometheus_reads_the_rules_and_raises_each_alert_in_its_case(command: str) -> None:
    done = subprocess.run(
        ["promtool", *command.split()], cwd=ROOT / "deploy/prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_have_numbers_and_places_of_their_own() -> None:
    panels = json.loads((ROOT / "deploy/grafana/dashboards/rmd.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells) and all(0 <= x < 24 for x, _ in cells)


def test_alerts_name_outcomes_that_exist() -> None:
    for expression in expressions():
        for outcomes in re.findall(r'outcome=~?"([^"]*)"', expression):
            assert set(outcomes.split("|")) <= set(OUTCOMES), expression


def test_compose_mounts_ports_and_times_fit() -> None:
    services = read_yaml("docker-compose.yml")["services"]
    assert set(read_yaml("deploy/compose.gpu.yml")["services"]) == {"rmd"}
    (target,) = read_yaml("deploy/prometheus/prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in services and services[host]["ports"][0].endswith(f":{port}")
    assert f"EXPOSE {port}" in (ROOT / "Dockerfile").read_text() and ServerSettings().port == int(port)
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./") or (ROOT / source).exists(), volume
    stop = ServerSettings().drain_seconds + LAST_BATCH_SECONDS + LAST_JOBS_SECONDS + LAST_REPLIES_SECONDS
    assert int(services["rmd"]["stop_grace_period"].removesuffix("s")) > stop


def test_the_proxy_of_the_docs_waits_for_as_long_as_a_reply_may_take() -> None:
    """No page named a proxy's read timeout, and nginx's own answered 504 to slow pictures."""
    (seconds,) = re.findall(r"^\s*proxy_read_timeout (\d+)s;", (ROOT / "docs/deployment.md").read_text(), re.MULTILINE)
    assert int(seconds) > ServerSettings().deadline_seconds
