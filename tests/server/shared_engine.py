"""Engines behind open doors, and fronts that find them: in this process, or in one of their own that can be killed.

``python -m tests.server.shared_engine`` runs one: settings and a public key in, its contact out.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import zmq

from server.device.engine import Engine
from server.device.host import EngineHost
from server.device.model import DeviceModel, Loaded
from server.device.open_door import OpenDoor
from server.device.settings import Contact, EngineSettings
from server.front.engine import engine_settings
from server.front.remote import KeyPair, RemoteEngine
from server.front.service import Service
from server.start.settings import ServerSettings
from tests.server.house import House, running

ROOT = Path(__file__).parents[2]
KEYS = KeyPair(*zmq.curve_keypair())


def no_jobs(*_: Any) -> Any:
    raise AssertionError("it makes pictures")


class SharedEngine:
    """One in a thread of the test's process: everything real but the process."""

    def __init__(self, model: DeviceModel) -> None:
        self.door = OpenDoor("127.0.0.1")
        self.door.admit([KEYS.public])
        self.contact = self.door.contact
        self._engine = Engine(self.door, lambda report: Loaded((model,)))
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self._engine.run()
        self.door.close()


class SharedEngineProcess:
    """One in a process of its own."""

    def __init__(self, settings: ServerSettings) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(engine_settings(settings, "cpu", "")) + b"\n")
        self.process.stdin.write(KEYS.public + b"\n")
        self.process.stdin.flush()
        self.contact = Contact(*self.process.stdout.readline().decode().split())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def front(settings: ServerSettings, name: str, keys: KeyPair = KEYS, **engines: Any) -> Iterator[House]:
    """Run a front that is told of these engines."""
    service = Service(settings, no_jobs, starts=())
    enlist(service, name, engines, keys)
    with running(service) as house:
        yield house


def enlist(service: Service, name: str, engines: Mapping[str, Any], keys: KeyPair = KEYS) -> None:
    found = {each: partial(RemoteEngine, engine.contact, keys, name) for each, engine in engines.items()}
    service.fleet.enlist(found, {})


def main() -> None:
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineSettings)
    host = EngineHost(settings, "127.0.0.1", 10.0, 20.0)
    host.admit([sys.stdin.buffer.readline().strip()])
    host.wait_ready()
    print(*host.contact, flush=True)
    sys.stdin.buffer.read()  # until the test ends


if __name__ == "__main__":
    main()
