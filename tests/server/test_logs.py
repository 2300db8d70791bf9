"""What the log says of a request, and what it never says."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from server.logs import JsonLines
from server.telemetry.facts import current_ids
from tests.server.house import URL, House


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """All that is logged, as ``log_format=json`` writes it."""
    stream, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines(current_ids))
    handler.addFilter(lambda record: not record.name.startswith("http"))  # the test's own client
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.setLevel(level)
    root.removeHandler(handler)


def test_a_line_a_request_in_json_and_never_its_words(house: House, lines: io.StringIO) -> None:
    drawn = house.draw("a hush", schedule="0+4")
    house.draw("hush " * 2000)
    house.draw("a", hush="hush")
    house.client.post(f"{URL}?api_key=hush", content=b'{"prompt": "hush')

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    house.gate.before = fail
    failed = house.draw("hush, broken")
    house.until(lambda: lines.getvalue().count('"rmd.access"') == 5, "the lines")
    assert "hush" not in lines.getvalue()
    logged = [json.loads(line) for line in lines.getvalue().splitlines()]
    access = [line for line in logged if line["logger"] == "rmd.access"]
    assert [line["status"] for line in access] == [200, 413, 400, 400, 500]
    first = access[0]
    assert first["request_id"] == drawn.headers["x-request-id"] and first["level"] == "info"
    assert {name: first[name] for name in ("key", "method", "path", "model", "schedule", "outcome")} == {
        "key": "-", "method": "POST", "path": URL, "model": "tiny", "schedule": "0+4", "outcome": "completed",
    }  # fmt: skip
    assert first["seconds"] >= first["compute_seconds"] > 0 and first["queue_seconds"] >= 0
    reasons = [line for line in logged if line["logger"] == "rmd.server" and "broken" in line["message"]]
    assert failed.headers["x-request-id"] in {line.get("request_id") for line in reasons}


def test_an_exception_is_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        found = (type(error), error, error.__traceback__)
    record = logging.LogRecord("a", logging.ERROR, "file", 1, "it %s", ("broke",), found)
    line = JsonLines(lambda: {"request_id": "7"}).format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert told["message"] == "it broke" and told["request_id"] == "7" and "ValueError: two\nlines" in told["exception"]
    assert told["time"].endswith("+00:00")
