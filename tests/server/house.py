"""A real server over a real (tiny, random) checkpoint, on a port of its own."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import torch
from PIL import Image

from rmd.backbones.executor import Executor
from rmd.size import Size
from server.device.model import DeviceModel
from server.front.service import Service, State
from server.start.films import open_jobs
from server.start.run import DrainingServer, make_server
from server.start.settings import ServerSettings
from tests.server.thread_engine import ThreadEngine

URL = "/v1/images/generations"


class Clock:
    """A clock that stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """An executor that runs everything for real, but only while it is open: it makes races happen on purpose.

    ``before`` is called with (component, size, inputs) before each run and may raise.
    """

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.opened = threading.Event()
        self.opened.set()
        self.arrived = threading.Event()
        self.calls: list[tuple[str, Size | None, int]] = []
        self.before: Callable[[str, Size | None, Mapping[str, torch.Tensor]], None] = lambda *_: None

    def close(self) -> None:
        self.arrived.clear()
        self.opened.clear()

    def open(self) -> None:
        self.opened.set()

    def run(self, component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self.arrived.set()
        assert self.opened.wait(90), "the gate was left closed"
        self.calls.append((component, size, next(iter(inputs.values())).shape[0]))
        self.before(component, size, inputs)
        return self.inner.run(component, size, inputs)


class House:
    """One running server and ways to look at it."""

    def __init__(self, service: Service, server: DrainingServer, url: str, gate: Any, model: Any) -> None:
        self.service, self.server, self.url, self.gate, self.model = service, server, url, gate, model
        self.client = httpx.Client(base_url=url, timeout=30)

    def draw(self, prompt: str = "a red rocket", **fields: Any) -> httpx.Response:
        return self.client.post(URL, json={"prompt": prompt, **fields})

    def send(self, **body: Any) -> socket.socket:
        """Send a request by hand and return its connection, to be closed before the reply."""
        content = json.dumps(body).encode()
        address = urlsplit(self.url)
        connection = socket.create_connection((address.hostname, address.port), timeout=30)
        head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return connection

    def in_background(self, work: Callable[[], Any]) -> Background:
        return Background(work)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples with this name and these labels."""
        total = 0.0
        for family in _families(self.client.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    def until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, f"never came: {what}"
            time.sleep(0.005)

    def until_waiting(self, items: int) -> None:
        """Wait until so many pictures are admitted, and engines told of all."""
        fleet = self.service.fleet

        def told() -> bool:
            with fleet._lock:
                places = [place for generation in fleet._ledger.all() for place in generation.places]
                known = sum(not place.left for place in places) == self.service.admission.items == items
                return known and not fleet._outbox

        self.until(told, f"{items} pictures admitted")

    def until_idle(self) -> None:
        self.until(lambda: self.service.admission.items == 0, "an empty queue")


class Background:
    """A call in a thread; ``result`` gives its value or raises what it raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._value = work()
        except BaseException as error:
            self._error = error

    def result(self, timeout: float = 30) -> Any:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "still running"
        if self._error is not None:
            raise self._error
        return self._value


def _families(text: str) -> Iterator[Any]:
    from prometheus_client.parser import text_string_to_metric_families

    return iter(text_string_to_metric_families(text))


def pixels(encoded: str | bytes) -> np.ndarray:
    """A reply's picture as int16 (H, W, 3), so that differences do not wrap."""
    content = base64.b64decode(encoded) if isinstance(encoded, str) else encoded
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(np.int16)


@contextmanager
def serving(model: DeviceModel, settings: ServerSettings, *others: DeviceModel) -> Iterator[House]:
    """Run a server for ``model``, and others beside it, until the block ends, their engine in a thread."""
    inner, film_seconds = model.backbone.executor, settings.video_deadline_seconds
    gate = Gate(inner)
    model.backbone.executor = gate
    told = {"policy": settings.policy, "film_seconds": film_seconds, "tracks": settings.tracks}
    service = Service(settings, open_jobs, [("cpu", lambda: ThreadEngine(model, *others, **told))])
    try:
        with running(service, gate, model) as house:
            yield house
    finally:
        model.backbone.executor = inner


@contextmanager
def running(service: Service, gate: Gate | None = None, model: DeviceModel | None = None) -> Iterator[House]:
    """Run a server until the block ends."""
    server = make_server(service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not (server.started and service.state is State.READY):
            assert time.monotonic() < end and thread.is_alive() and service.failure is None, service.failure
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        house = House(service, server, f"http://127.0.0.1:{port}", gate, model)
        yield house
        house.client.close()
    finally:
        if gate is not None:
            gate.open()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"
