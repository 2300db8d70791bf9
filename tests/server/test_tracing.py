"""Traces, as a real receiver takes them over OTLP/HTTP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra 'otel' is not installed")

from bench.otlp import OtlpReceiver, ReceivedSpan
from server.device.model import DeviceModel
from server.start.settings import ServerSettings
from tests.server.conftest import make_settings
from tests.server.house import House, serving
from tests.server.test_processes import until_all_ready
from tests.server.test_stages import QUICK, apart

CALLER_TRACE, CALLER_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"
URL = "/v1/images/generations"
QUERIED = f"{URL}?api_key=hush"


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.endpoint)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")  # spans of its own would hold the query
        yield running


def named(spans: Sequence[ReceivedSpan], name: str) -> list[ReceivedSpan]:
    return [span for span in spans if span.name == name]


def test_a_request_is_a_trace_and_its_batches_are_linked_to_it(
    receiver: OtlpReceiver, checkpoint: Path, model: DeviceModel
) -> None:
    with serving(model, make_settings(checkpoint, tracing=True)) as house:
        house.gate.close()
        calls = [
            house.in_background(partial(house.client.post, QUERIED, json={"prompt": prompt, "n": 2}, headers=headers))
            for prompt, headers in (("a hush", {"traceparent": TRACEPARENT}), ("another hush", {}))
        ]
        house.until_waiting(4)
        house.gate.open()
        first, second = (call.result() for call in calls)
        house.client.get("/health/live")
        metrics = house.client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}).text
    counted = next(line for line in metrics.splitlines() if re.match("rmd_request_seconds_bucket.* # ", line))
    assert re.search('trace_id="([0-9a-f]{32})"', counted)[1] in {  # type: ignore[index]
        reply.headers["traceparent"].split("-")[1] for reply in (first, second)
    }
    version, trace, parent, flags = first.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", CALLER_TRACE, "01")
    spans = receiver.spans
    mine = [span for span in spans if span.trace == CALLER_TRACE]
    (root,) = named(mine, f"POST {URL}")
    assert root.id == parent and root.parent == CALLER_SPAN
    assert root.attributes["http.response.status_code"] == 200 and root.attributes["rmd.outcome"] == "completed"
    assert root.resource["service.name"] == "rmd" and root.resource["deployment.environment"] == "test"
    children: dict[str, list[ReceivedSpan]] = defaultdict(list)
    for span in mine:
        children[span.parent].append(span)
        assert span.attributes["rmd.request_id"] == first.headers["x-request-id"]
        assert root.start <= span.start <= span.end <= root.end, span.name
    assert [span.name for span in sorted(children[root.id], key=lambda span: (span.start, span.name))] == [
        "admission", "picture 0", "picture 1", "reply",
    ]  # fmt: skip
    for picture in named(mine, "picture 0") + named(mine, "picture 1"):
        steps = sorted(children[picture.id], key=lambda span: span.start)
        assert [span.name for span in steps if span.name != "queue"] == [
            "encode", "step 1 at 32x32", "step 2 at 32x32", "step 3 at 64x64", "step 4 at 64x64", "decode", "package",
        ]  # fmt: skip
        assert named(steps, "queue"), "it waited for the gate"
        assert {span.name: dict(span.events) for span in steps if span.events} == {
            "step 3 at 64x64": {"hand-over": {"from": "32x32", "to": "64x64"}}
        }
        assert picture.attributes["rmd.model"] == "tiny" and picture.attributes["rmd.schedule"] == "2+2"
    batches = {span.id: span for span in spans if span.name.startswith("batch at ")}
    (wide,) = [b for b in batches.values() if b.name == "batch at 32x32" and b.attributes["rmd.batch.company"] == 4][:1]
    together = {second.headers["x-request-id"], first.headers["x-request-id"]}
    assert wide.attributes["rmd.batch.mates"] == 3 and set(wide.attributes["rmd.request_ids"]) == together
    assert wide.parent == "" and wide.trace not in {CALLER_TRACE, second.headers["traceparent"].split("-")[1]}
    by_id = {span.id: span for span in spans}
    assert sorted(by_id[link].name for link in wide.links) == ["step 1 at 32x32"] * 4
    for member in (by_id[link] for link in wide.links):
        assert member.links == (wide.id,) and (member.start, member.end) == (wide.start, wide.end)
        assert member.attributes["rmd.station"] == "32x32" and member.attributes["rmd.batch.rows"] == 4
    assert not [span for span in spans if "health" in span.name]
    assert "hush" not in json.dumps([dict(span.attributes) for span in spans])


def test_a_trace_goes_through_the_engines_of_stages_apart(receiver: OtlpReceiver, checkpoint: Path) -> None:
    with apart(make_settings(checkpoint, tracing=True, **QUICK), "low,high,decode") as house:
        until_all_ready(house)
        assert house.client.post(URL, json={"prompt": "a"}, headers={"traceparent": TRACEPARENT}).status_code == 200
    mine = [span for span in receiver.spans if span.trace == CALLER_TRACE]
    (picture,) = named(mine, "picture 0")
    steps = sorted((span for span in mine if span.parent == picture.id), key=lambda span: span.start)
    assert [(span.name, span.attributes["rmd.engine"]) for span in steps if "rmd.engine" in span.attributes] == [
        ("encode", 0), ("step 1 at 32x32", 0), ("step 2 at 32x32", 0),
        ("encode", 1), ("step 3 at 64x64", 1), ("step 4 at 64x64", 1), ("decode", 2),
    ]  # fmt: skip
    handed = [dict(span.events).get("hand-over") for span in named(steps, "step 3 at 64x64")]
    assert handed == [{"from": "32x32", "to": "64x64"}]


def test_what_is_not_sampled_is_not_sent_and_batches_follow_their_members(
    receiver: OtlpReceiver, checkpoint: Path, model: DeviceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    with serving(model, make_settings(checkpoint, tracing=True)) as house:
        assert int(house.draw().headers["traceparent"][-2:], 16) & 1 == 0
        assert house.client.post(URL, json={"prompt": "a"}, headers={"traceparent": TRACEPARENT}).status_code == 200
    assert {span.trace for span in receiver.spans if not span.name.startswith("batch at ")} == {CALLER_TRACE}
    assert sum(span.name.startswith("batch at ") for span in receiver.spans) == 6, "encode may be known; its own only"


def test_failures_and_partial_pictures_are_told(receiver: OtlpReceiver, checkpoint: Path, model: DeviceModel) -> None:
    with serving(model, make_settings(checkpoint, tracing=True)) as house:
        with house.client.stream("POST", URL, json={"prompt": "a", "stream": True, "partial_images": 1}) as reply:
            assert reply.read()

        def fail(component: str, *_: object) -> None:
            if component == "decoder":
                raise RuntimeError("broken")

        house.gate.before = fail
        assert house.draw().status_code == 500
    partial = named(receiver.spans, "decode partial")
    assert len(partial) == 1 and partial[0].links
    (picture,) = [span for span in named(receiver.spans, "picture 0") if span.failed]
    assert picture.attributes["rmd.outcome"] == "engine_failed"
    tries = [span for span in named(receiver.spans, "decode") if span.parent == picture.id]
    assert [span.attributes["rmd.batch.failed"] for span in tries] == ["retried", "lost"]
    assert all(span.failed for span in tries)


def test_a_films_trace_goes_on_in_its_job_after_a_restart(
    receiver: OtlpReceiver, film_model: DeviceModel, film_settings: ServerSettings
) -> None:
    settings = film_settings.model_copy(update={"tracing": True, "drain_seconds": 0.0})
    with serving(film_model, settings) as house:
        house.gate.close()
        sent = house.client.post("/v1/videos", json={"prompt": "a"}, headers={"traceparent": TRACEPARENT})
        assert sent.status_code == 200 and "trace" not in sent.json()
        house.until_waiting(1)
        house.gate.opened.set()
        house.service.fleet.stop(0.0)
    receiver.spans.clear()
    with serving(film_model, settings) as house:
        _until_done(house, sent.json()["id"])
        remix = house.client.post(f"/v1/videos/{sent.json()['id']}/remix", json={"prompt": "b"})
        assert remix.status_code == 200, remix.text
        _until_done(house, remix.json()["id"])
    film = next(span for span in named(receiver.spans, "film") if span.trace == CALLER_TRACE)
    assert film.attributes["rmd.request_id"] == sent.json()["id"] and film.attributes["rmd.outcome"] == "completed"
    assert [span for span in receiver.spans if span.parent == film.id and span.name == "decode"]
    assert len({span.trace for span in named(receiver.spans, "film")}) == 2, "a remix is traced by its own request"


def _until_done(house: House, job_id: str) -> None:
    house.until(lambda: house.client.get(f"/v1/videos/{job_id}").json()["status"] == "completed", "the film")


def test_without_tracing_the_sdk_is_not_imported() -> None:
    modules = "server.front.service, server.http.app, server.start.run"
    script = f"import {modules}, sys; sys.exit('opentelemetry.sdk' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0


def test_tracing_without_its_packages_says_what_to_install(
    checkpoint: Path, model: DeviceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "server.telemetry.tracing", raising=False)
    with pytest.raises(ValueError, match=r"'rmd\[otel\]'"), serving(model, make_settings(checkpoint, tracing=True)):
        pass
