"""A slow client, a taken port, the progress bar: each alone."""

from __future__ import annotations

import asyncio
import socket

import pytest
from starlette.types import Message

from server.front.service import Progress, Service
from server.http import streaming
from server.start.progress import ProgressLine
from server.start.run import make_server
from server.start.settings import ServerSettings


def test_a_slow_client_is_waited_for_as_long_as_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CLIENT_PATIENCE_SECONDS", 0.2)
    body, taken = bytes(range(256)) * 2560, list[Message]()

    async def slow(message: Message) -> None:
        await asyncio.sleep(0.03)
        taken.append(message)

    async def stuck(_message: Message) -> None:
        await asyncio.sleep(60)

    async def scenario() -> None:
        await streaming._impatient(slow)({"type": "http.response.body", "body": body, "more_body": False})
        with pytest.raises(TimeoutError):
            await streaming._impatient(stuck)({"type": "http.response.body", "body": b"x", "more_body": True})

    asyncio.run(scenario())
    assert len(taken) == 10, "together longer than the patience for one"
    assert b"".join(message["body"] for message in taken) == body
    assert [message["more_body"] for message in taken] == [True] * 9 + [False]


def test_a_taken_port_is_told_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServerSettings(port=taken.getsockname()[1])
        with pytest.raises(ValueError, match=r"cannot listen on 127\.0\.0\.1 port .*; choose another --port"):
            make_server(Service(settings, lambda *_: pytest.fail("it was loaded")))


def test_the_progress_bar_goes_on_after_the_engines_and_ends_when_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    with ProgressLine() as line:
        line.update(Progress(3, 3, "building engines"))
        line.update(Progress(1, 4, "loading the weights"))
        line.update(Progress(4, 4, "ready"))
        shown = capsys.readouterr().err
        line.update(Progress(4, 4, "after the end"))
    assert "ready" in shown and "after the end" not in shown + capsys.readouterr().err
