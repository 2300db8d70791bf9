"""Whoever opens connections and says nothing takes nobody's place."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from server.device.model import DeviceModel
from server.http import connections
from server.start import run
from tests.server.conftest import make_settings
from tests.server.house import URL, House, serving

MOST = 6


@contextmanager
def small_house(checkpoint: Path, loaded: DeviceModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr(run, "bounds", lambda descriptors: (MOST, 64))
    with serving(loaded, make_settings(checkpoint)) as house:
        yield house


def opened(house: House, first: bytes = b"") -> socket.socket:
    address = urlsplit(house.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=30)
    connection.sendall(first)
    return connection


def asked(house: House, path: str) -> int:
    """The status that a newcomer gets."""
    with httpx.Client(base_url=house.url, timeout=30) as client:
        return client.get(path).status_code


def test_silent_connections_make_room(checkpoint: Path, loaded: DeviceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,100 of them under 1,024 descriptors made the server unreachable, and failed every accepted film."""
    beginnings = [b"", b"GET / HTT", f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{{".encode()]
    with small_house(checkpoint, loaded, monkeypatch) as house, ExitStack() as held:
        for number in range(10 * MOST):
            held.enter_context(opened(house, beginnings[number % len(beginnings)]))
        assert [asked(house, path) for path in ("/health/live", "/metrics", "/v1/models")] == [200] * 3
        assert house.draw().status_code == 200


def test_where_all_are_at_work_probes_alone_come_in(
    checkpoint: Path, loaded: DeviceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_house(checkpoint, loaded, monkeypatch) as house:
        house.gate.close()
        house.client.close()  # the fixture's own connection
        calls = [house.in_background(lambda: httpx.post(house.url + URL, json={"prompt": "a"})) for _ in range(MOST)]
        house.until_waiting(MOST)
        assert [asked(house, path) for path in ("/health/live", "/health/ready", "/metrics")] == [200] * 3
        with httpx.Client(base_url=house.url) as client:
            crowded = client.get("/v1/models")
        house.gate.open()
        assert crowded.status_code == 503 and crowded.json()["error"]["code"] == "not_ready"
        assert crowded.headers["retry-after"] == "5" and crowded.headers["connection"] == "close"
        assert [call.result().status_code for call in calls] == [200] * MOST, "whoever is served stays"
        house.until(lambda: asked(house, "/v1/models") == 200, "room again")
        house.client = httpx.Client(base_url=house.url)


def test_a_head_that_does_not_come_is_not_waited_for(
    checkpoint: Path, loaded: DeviceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CLIENT_PATIENCE_SECONDS", 0.2)
    whole = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with small_house(checkpoint, loaded, monkeypatch) as house:
        with opened(house) as silent, opened(house, b"GET / HTTP/1.1\r\nHo") as slow:
            assert silent.recv(4096) == b""
            told = b"".join(iter(lambda: slow.recv(4096), b""))
            assert told.startswith(b"HTTP/1.1 408 ") and b'"code":"head_timeout"' in told
        with opened(house, whole) as kept:
            assert kept.recv(4096).startswith(b"HTTP/1.1 200 ")
            kept.sendall(b"GET / HTTP/1.1\r\nHo")
            assert b"HTTP/1.1 408 " in b"".join(iter(lambda: kept.recv(4096), b""))


def test_the_limit_of_descriptors_is_raised_and_shared_out() -> None:
    script = (
        "import resource as r; from server.http.connections import raise_descriptor_limit as f\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (256, 2000)); assert f() == 2000 == r.getrlimit(r.RLIMIT_NOFILE)[0]"
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 2000
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=True)
    for descriptors in (256, 1024, 20_000, 65_536):
        most, line = connections.bounds(descriptors)
        assert most + 2 * line < descriptors, "a full line on top of all connections leaves room for files"
