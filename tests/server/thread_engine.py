"""An engine in a thread of the test's own process: everything real but the process boundary."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial

from server.core.messages import Stop
from server.device.door import Door
from server.device.engine import Engine, ModelLoader, Report
from server.device.model import DeviceModel, Loaded
from server.front.engine import Doorway


class ThreadEngine(Doorway):
    """See `server.front.engine.EngineLink`. It cannot be killed, only told to stop.

    Args:
        models: that are served.
        load: gives another, as an engine's own loading would.
        tracks: batches at a time, where queues are long.
    """

    def __init__(
        self,
        *models: DeviceModel,
        policy: str = "stagewise",
        film_seconds: float = 3600.0,
        load: ModelLoader | None = None,
        tracks: int = 1,
    ) -> None:
        super().__init__()
        self.pid = os.getpid()
        if load is None:
            load = partial(_given, models)
        self.engine = Engine(Door(self.address), load, policy, film_seconds, tracks=tracks)
        self._thread = threading.Thread(target=self.engine.run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def kill(self) -> None:
        self.stop(10)

    def stop(self, timeout: float) -> None:
        if self.running:
            self.send(Stop())
        self._thread.join(timeout)


def _given(models: Sequence[DeviceModel], report: Report) -> Loaded:
    return Loaded(models)
