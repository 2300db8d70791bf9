"""Whoever opens connections and says nothing takes nobody's place."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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
        calls = [
            house.in_background(lambda: httpx.post(house.url + URL, json={"prompt": "a"}, timeout=30))
            for _ in range(MOST)
        ]
        house.until_waiting(MOST)
        assert [asked(house, path) for path in ("/health/live", "/health/ready", "/metrics")] == [200] * 3
        with httpx.Client(base_url=house.url) as client:
            crowded = client.get("/v1/models")
        house.gate.open()
        assert crowded.status_code == 503 and crowded.json()["error"]["code"] == "not_ready"
        assert 5 <= int(crowded.headers["retry-after"]) <= 10 and crowded.headers["connection"] == "close"
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


# -- clients that read slowly ------------------------------------------------------------------------------------------

MANY = {"prompt": "a", "n": 10}


def slow_reader(house: House, body: dict[str, object]) -> socket.socket:
    """A connection that has sent a request, and of whose reply the system keeps little."""
    address, content = urlsplit(house.url), json.dumps(body).encode()
    house.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(60)
    connection.connect((address.hostname, address.port))
    head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def read(connection: socket.socket, pause: float = 0.0, at_once: int = 65536) -> bytes:
    """What arrives until the server ends it."""
    received = bytearray()
    with suppress(ConnectionResetError):
        while piece := connection.recv(at_once):
            received += piece
            time.sleep(pause)
    return bytes(received)


def whole(reply: bytes) -> bool:
    head, _, body = reply.partition(b"\r\n\r\n")
    if b"text/event-stream" in head:
        return b"[DONE]" in body
    return len(body) == int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_is_not_kept_for_who_reads_a_byte_now_and_then(
    checkpoint: Path, loaded: DeviceModel, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """It was, for ever: a byte every 29 seconds was enough."""
    monkeypatch.setattr(connections, "CLIENT_PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(connections, "_LEAST_PACE", 200_000)
    with serving(loaded, make_settings(checkpoint)) as house, slow_reader(house, {**MANY, "stream": stream}) as slow:
        received = bytearray(slow.recv(1))

        def creep() -> bool:
            received.extend(slow.recv(1))
            return not house.server.server_state.connections

        house.until(creep, "its end")
        received += read(slow)
        assert received.startswith(b"HTTP/1.1 200 ") and not whole(bytes(received))


@pytest.mark.parametrize("stream", [False, True])
def test_who_keeps_the_pace_gets_everything_however_long_it_takes(
    checkpoint: Path, loaded: DeviceModel, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(connections, "CLIENT_PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(connections, "_LEAST_PACE", 2000)
    with serving(loaded, make_settings(checkpoint)) as house, slow_reader(house, {**MANY, "stream": stream}) as slow:
        begun = time.monotonic()
        assert whole(read(slow, pause=0.02, at_once=2048)) and time.monotonic() - begun > 0.3


def test_what_nobody_reads_is_bounded_and_who_was_behind_first_is_given_up(
    checkpoint: Path, loaded: DeviceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(loaded, make_settings(checkpoint)) as house, ExitStack() as held:
        size = len(house.draw(n=10).content)
        monkeypatch.setattr(connections, "_MOST_UNREAD", 3 * size)
        readers = [held.enter_context(slow_reader(house, {**MANY, "stream": True}))]
        house.until(lambda: house.metric("rmd_pictures_total") == 20, "all that it does not read")
        for ended in (2, 4, 5, 6):  # the first picture's request too, and from the second one on the stream's
            readers.append(held.enter_context(slow_reader(house, MANY)))
            house.until(lambda most=ended: house.metric("rmd_requests_total", route=URL) == most, "its reply")
        assert house.draw().status_code == 200
        assert [whole(read(reader)) for reader in readers] == [False, False, True, True, True]
