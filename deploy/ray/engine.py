"""A replica that owns one device and runs the engine's loop on it. Its work does not come through Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import Any

import ray
from ray import serve

from deploy.ray.asking import Asking
from deploy.ray.roster import Share
from server.core.stages import Stages
from server.device.host import EngineHost
from server.front.engine import engine_settings
from server.start.settings import ServerSettings

WORK = "work_seconds"
"""What the autoscaler hears of each engine."""

_ANSWER_SECONDS = 5.0
_LOOK_SECONDS = 0.5

log = logging.getLogger("rmd.server")


class EngineReplica:
    """See the module. The replica is up once the models are loaded and warm.

    Args:
        settings: the application's.
        roster: handle of `deploy.ray.roster`.
        stages: what it does.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, settings: ServerSettings, roster: Any, stages: Stages
    ) -> None:
        logging.basicConfig(level=settings.log_level.upper())
        self._settings, self._roster = settings, roster
        self._name = serve.get_replica_context().replica_id.unique_id
        self._work, self._leaving = 0.0, False
        told = engine_settings(settings, settings.device.partition(":")[0], address="", stages=stages)
        host = ray.util.get_node_ip_address()
        self._host = EngineHost(told, host, settings.watchdog_seconds, settings.watchdog_factor)
        await asyncio.to_thread(self._host.wait_ready)
        self._admitted = b""
        self._asking = Asking(self._report)
        self._asking.start()
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    def _report(self) -> None:
        told = self._roster.engine.remote(self._name, self._host.contact, self._admitted)
        share: Share = told.result(timeout_s=_ANSWER_SECONDS)
        self._work = share.work
        if share.key != self._admitted:
            self._host.admit([share.key])
            self._admitted = share.key
            self._report()  # now it can be listed

    async def _watch(self) -> None:
        """End the process where its engine has ended or hangs: Ray starts another, fronts hand out its work again.

        Not by the health check alone: Ray would first let the replica shut down in its own time.
        """
        while not self._leaving:
            try:
                self._host.check()
            except RuntimeError as error:
                log.error("%s", error)
                os._exit(1)
            await asyncio.sleep(_LOOK_SECONDS)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Ray: this engine's share of all fronts' admitted work, that which no engine has yet included."""
        return {WORK: self._work}

    async def __del__(self) -> None:
        """Called by Ray before it ends the replica: finish what fronts have given to it."""
        self._leaving = True
        self._asking.stop()
        with contextlib.suppress(TimeoutError):  # the whole application ends, the roster first
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._roster.engine_leaves.remote(self._name)
        if not await asyncio.to_thread(self._host.leave, self._settings.drain_seconds):
            log.warning("drain_seconds passed: other engines begin anew what is left")
