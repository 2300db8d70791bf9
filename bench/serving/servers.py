"""Whole HTTP servers as a bench handles them: started, asked, stopped for the while that another is measured, ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.serving.outcomes import Outcome
from bench.serving.traces import Ask

_READY_SECONDS = 900.0
_PATH = "/v1/images/generations"
ROOT = Path(__file__).parents[2]
OURS = "rmd serve"


class Server:
    """A server and all its processes, stopped or going on together."""

    def __init__(self, name: str, command: Sequence[str], port: int, environment: Mapping[str, str]) -> None:
        self.name, self.port = name, port
        self._process = subprocess.Popen(command, env=dict(environment), start_new_session=True, cwd=ROOT)

    def wait_until_ready(self) -> None:
        """Ask for a picture until there is one.

        Raises:
            RuntimeError: the server ended, or none came in time.
        """
        body = json.dumps({"prompt": "a red apple", "seed": 1}).encode()
        url, until = f"http://127.0.0.1:{self.port}{_PATH}", time.monotonic() + _READY_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with {self._process.returncode}")
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=300):
                    return
            except (OSError, urllib.error.URLError):
                time.sleep(0.5)
        raise RuntimeError(f"{self.name} does not get ready")

    def stand_still(self) -> None:
        """Take the cores away from it."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Give them back."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def end(self) -> None:
        """End it and everything it has started."""
        self.go_on()
        os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def play(self, trace: Sequence[Ask], clients: int | None = None, fresh: bool = False) -> list[Outcome]:
        """Send a trace from a process of its own.

        Args:
            clients: None sends each request at its time; a number keeps that many on their way instead.
            fresh: each on a connection of its own.
        """
        bodies = [{"prompt": a.prompt, "seed": a.seed % 2**31, "schedule": a.schedule} for a in trace]
        told = {"host": "127.0.0.1", "port": self.port, "path": _PATH, "clients": clients, "fresh": fresh}
        told |= {"times": [ask.at for ask in trace], "bodies": bodies}
        command = [sys.executable, "-m", "bench.serving.client"]
        done = subprocess.run(
            command, input=json.dumps(told) + "\n", capture_output=True, text=True, check=True, cwd=ROOT
        )
        fates = json.loads(done.stdout)
        return [
            Outcome(ask, sent, status, finished=finished)
            for ask, (sent, finished, status) in zip(trace, fates, strict=True)
        ]


def start_ours(checkpoint: Path, engines: Path, environment: Mapping[str, str], **settings: str) -> Server:
    """Start ``rmd serve`` on a free port.

    Args:
        environment: of the process.
        settings: by their names in lower case.
    """
    port = free_port()
    command = [sys.executable, "-c", "from cli.main import main; main()", "serve", "--port", str(port)]
    command += ["--checkpoint", str(checkpoint), "--engines", str(engines)]
    told = {f"RMD_{name.upper()}": value for name, value in settings.items()}
    return Server(OURS, command, port, {**environment, **told})


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def plain(settings: Any) -> dict[str, Any]:
    """Return a bench's settings, a dataclass, as its report holds them: paths are text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
