"""An engine process that certain prompts make sick: what real devices do, on demand. For tests alone."""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from typing import Any

import msgspec
from msgspec import structs
from torch import Tensor

from rmd.backbones.executor import EagerExecutor
from rmd.size import Size
from server.core.stages import ALL, Stages
from server.core.stations import StationKey
from server.core.tickets import Ticket
from server.device import process
from server.device.settings import EngineSettings
from server.device.steps import Done, StageRunner
from server.front.engine import Doorway, EngineProcess, engine_settings
from server.start.settings import ServerSettings

DIES, HANGS, BREAKS = "a prompt that kills", "a prompt that hangs", "a prompt that breaks the device"

_FORKS = multiprocessing.get_context("forkserver")


class Forked:
    """A started engine with as much of :class:`subprocess.Popen` as :class:`EngineProcess` asks of one."""

    def __init__(self, settings: EngineSettings) -> None:
        _FORKS.set_forkserver_preload(["tests.server.warm_engine"])
        self._process = _FORKS.Process(target=_forked, args=(settings,))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._lock = threading.Lock()  # what it ended with can be read once
        atexit.register(self.kill)

    def poll(self) -> int | None:
        with self._lock:
            return self._process.exitcode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float) -> None:
        connection.wait([self._process.sentinel], timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("engine", timeout)


class SickEngine(EngineProcess):
    """Starts one, forked from a process that has imported everything: a dozen of them would take a minute over it.

    Engines that are started as a server starts them: `test_an_engine_does_not_outlive_its_front`.
    """

    def __init__(self, settings: ServerSettings, device: str, stages: Stages = ALL) -> None:
        Doorway.__init__(self)
        self.process = Forked(engine_settings(settings, device, self.address, stages))  # type: ignore[assignment]
        self.pid = self.process.pid


def _forked(settings: EngineSettings) -> None:
    line = msgspec.json.encode(structs.replace(settings, parent=os.getppid()))
    sys.stdin = io.TextIOWrapper(io.BytesIO(line + b"\n"))
    main()


def main() -> None:
    """Run an engine whose work first looks at the prompts."""
    plain_run, plain_call, broken = StageRunner.run, EagerExecutor.run, list[str]()

    def run(self: StageRunner, key: StationKey, tickets: Sequence[Ticket]) -> Done:
        prompts = {ticket.request.work.prompt for ticket in tickets} if key.kind == "denoise" else set()
        if DIES in prompts:
            os.kill(os.getpid(), signal.SIGKILL)
        while HANGS in prompts:
            signal.pause()
        if BREAKS in prompts:
            broken.append(BREAKS)
        return plain_run(self, key, tickets)

    def call(self: EagerExecutor, component: str, size: Size | None, inputs: Mapping[str, Tensor]) -> Any:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return plain_call(self, component, size, inputs)

    StageRunner.run = run  # type: ignore[method-assign]
    EagerExecutor.run = call  # type: ignore[method-assign]
    process.main()
