"""A taken port, the progress bar: each alone."""

from __future__ import annotations

import socket

import pytest

from server.front.service import Progress, Service
from server.start.progress import ProgressLine
from server.start.run import make_server
from server.start.settings import ServerSettings


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
