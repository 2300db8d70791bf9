"""An engine process that certain prompts make sick: what real devices do, on demand. For tests alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rmd.backbones.executor import EagerExecutor
from rmd.size import Size
from server.core.stations import StationKey
from server.core.tickets import Ticket
from server.device import process
from server.device.steps import Done, StageRunner
from server.front.engine import EngineProcess

DIES, HANGS, BREAKS = "a prompt that kills", "a prompt that hangs", "a prompt that breaks the device"


class SickEngine(EngineProcess):
    """Starts one."""

    module = __name__


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


if __name__ == "__main__":
    main()
