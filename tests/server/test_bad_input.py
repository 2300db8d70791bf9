"""Whatever arrives, the reply is a 4xx in the one error shape, names the field, and the server keeps serving."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from server.device.model import DeviceModel
from tests.server.conftest import make_settings
from tests.server.house import URL, House, serving


@pytest.fixture(scope="module")
def open_house(checkpoint: Path, loaded: DeviceModel) -> Iterator[House]:
    with serving(loaded, make_settings(checkpoint)) as running:
        yield running


def check_error(reply: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(reply.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["message"] and len(error["message"]) < 400
    return error


BAD_FIELDS: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": "  \n"}, 400, "prompt"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": 7}, 400, "prompt"),
    ({"prompt": ["a"]}, 400, "prompt"),
    ({"prompt": "x" * 4001}, 413, "prompt"),
    ({"prompt": "a", "model": "gpt-image-2"}, 404, "model"),
    ({"prompt": "a", "model": 3}, 400, "model"),
    ({"prompt": "a", "n": 0}, 400, "n"),
    ({"prompt": "a", "n": -1}, 400, "n"),
    ({"prompt": "a", "n": 10**6}, 400, "n"),
    ({"prompt": "a", "n": 1.5}, 400, "n"),
    ({"prompt": "a", "n": "2"}, 400, "n"),
    ({"prompt": "a", "n": True}, 400, "n"),
    ({"prompt": "a", "size": "63x64"}, 400, "size"),
    ({"prompt": "a", "size": "1024x1024"}, 400, "size"),
    ({"prompt": "a", "size": "32x32"}, 400, "size"),
    ({"prompt": "a", "size": "x" * 5000}, 400, "size"),
    ({"prompt": "a", "size": 64}, 400, "size"),
    ({"prompt": "a", "schedule": "9+9"}, 400, "schedule"),
    ({"prompt": "a", "schedule": 4}, 400, "schedule"),
    ({"prompt": "a", "seed": -1}, 400, "seed"),
    ({"prompt": "a", "seed": 2**63}, 400, "seed"),
    ({"prompt": "a", "seed": "7"}, 400, "seed"),
    ({"prompt": "a", "noise_intensity": 1.01}, 400, "noise_intensity"),
    ({"prompt": "a", "schedule": "teacher", "guidance_scale": -1}, 400, "guidance_scale"),
    ({"prompt": "a", "schedule": "teacher", "guidance_scale": "high"}, 400, "guidance_scale"),
    ({"prompt": "a", "schedule": "teacher", "negative_prompt": "x" * 4001}, 413, "negative_prompt"),
    ({"prompt": "a", "response_format": "file"}, 400, "response_format"),
    ({"prompt": "a", "response_format": "url", "stream": True}, 400, "response_format"),
    ({"prompt": "a", "output_format": "gif"}, 400, "output_format"),
    ({"prompt": "a", "output_compression": 101, "output_format": "jpeg"}, 400, "output_compression"),
    ({"prompt": "a", "output_compression": 50}, 400, "output_compression"),
    ({"prompt": "a", "background": "transparent"}, 400, "background"),
    ({"prompt": "a", "stream": "yes"}, 400, "stream"),
    ({"prompt": "a", "partial_images": 4, "stream": True}, 400, "partial_images"),
    ({"prompt": "a", "steps": 4}, 400, "steps"),
]


@pytest.mark.parametrize(("body", "status", "param"), BAD_FIELDS)
def test_a_bad_field_is_named(open_house: House, body: dict[str, Any], status: int, param: str) -> None:
    check_error(open_house.client.post(URL, json=body), status, param)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"not json",
        b'"a string"',
        b"[1]",
        b"null",
        b'{"prompt": "a", "n": 1e400}',
        b'{"prompt": "a", "noise_intensity": NaN}',
        b"[" * 50_000,
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "size": "\\ud800"}',
        b'{"prompt": "a", "model": "\\ud800"}',
        b'{"prompt": "a", "\\ud800": 1}',
        b"\xff\xfe\x00",
    ],
)
def test_broken_bodies(open_house: House, content: bytes) -> None:
    reply = open_house.client.post(URL, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert reply.headers["x-should-retry"] == "false"


def test_a_body_of_another_type(open_house: House) -> None:
    check_error(open_house.client.post(URL, data={"prompt": "a"}), 400, None)


def test_the_longest_prompts_in_their_longest_writing_are_taken(open_house: House) -> None:
    """Each character as two escapes of six bytes, as Python's json writes it: got 413."""
    longest = "\U0001f680" * 4000
    content = json.dumps({"prompt": longest, "negative_prompt": longest, "schedule": "teacher"})
    reply = open_house.client.post(URL, content=content, headers={"Content-Type": "application/json"})
    assert len(content) > 96_000 and reply.status_code == 200, reply.text


def test_a_ten_megabyte_prompt(open_house: House) -> None:
    check_error(open_house.client.post(URL, json={"prompt": "x" * 10_000_000}), 413, "prompt")


def test_a_ten_megabyte_body_in_chunks_of_undeclared_length(open_house: House) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(160):
            yield b"x" * 65_536

    check_error(open_house.client.post(URL, content=chunks()), 413, "prompt")


def test_a_body_that_does_not_come_is_not_waited_for(open_house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.incoming.CLIENT_PATIENCE_SECONDS", 0.1)
    address = urlsplit(open_house.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("where", ["url", "header", "headers"])
def test_a_request_line_or_headers_without_end_are_cut_off(open_house: House, where: str) -> None:
    """Before anybody asked for a key."""
    address = urlsplit(open_house.url)
    begun = {
        "url": b"GET /",
        "header": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ",
        "headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n",
    }
    piece = b"X: y\r\n" * 10_000 if where == "headers" else b"a" * 60_000
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(begun[where])
        with pytest.raises(OSError):
            for _ in range(100):
                connection.sendall(piece)


def test_wrong_methods_and_unknown_routes(open_house: House) -> None:
    wrong = open_house.client.get(URL)
    check_error(wrong, 405, None)
    assert wrong.headers["allow"] == "POST"
    check_error(open_house.client.post("/v1/images/edits", json={}), 404, None)
    check_error(open_house.client.get("/v1/models/nothing"), 404, "model")
    check_error(open_house.client.get("/nowhere"), 404, None)


def test_the_server_keeps_serving(open_house: House) -> None:
    assert open_house.draw().status_code == 200
    assert open_house.metric("rmd_in_flight_items") == 0


def test_fields_that_only_the_official_client_knows_are_ignored(open_house: House) -> None:
    reply = open_house.draw(moderation="low", style="vivid", user="u", quality="hd", background="auto", frame_count=3)
    assert reply.status_code == 200 and reply.json()["safety_identifier"] is None
    assert open_house.draw(safety_identifier="s").json()["safety_identifier"] == "s"


def test_keys_are_asked_for_before_the_body_is_read(checkpoint: Path, loaded: DeviceModel) -> None:
    with serving(loaded, make_settings(checkpoint, api_keys="secret")) as house:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            refused = house.client.post(URL, content=b"{", headers=headers)
            check_error(refused, 401, None)
            assert refused.headers["www-authenticate"] == "Bearer" and "secret" not in refused.text
        assert house.client.get("/v1/models").status_code == 401
        assert house.client.get("/health/ready").status_code == 200
        right = {"Authorization": "Bearer secret"}
        assert house.client.post(URL, json={"prompt": "a"}, headers=right).status_code == 200
