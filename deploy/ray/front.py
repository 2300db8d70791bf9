"""A replica that speaks HTTP: `rmd serve`'s own application, whose engines are found through the roster."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from typing import Any

import ray
from fastapi import FastAPI
from prometheus_client import start_http_server
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from deploy.ray.asking import Asking
from deploy.ray.roster import Listing
from server.front.remote import RemoteEngine
from server.front.service import Service
from server.garbage import settle_heap
from server.http.app import create_app
from server.start.films import open_jobs
from server.start.settings import ServerSettings

_ANSWER_SECONDS = 5.0


class FrontReplica:
    """See the module. A deployment by ``serve.ingress()``.

    Args:
        settings: the application's.
        roster: handle of `deploy.ray.roster`.
        engines: handles of `deploy.ray.engine`; held so that Ray takes them for part of the application.
    """

    def __init__(self, settings: ServerSettings, roster: Any, *engines: Any) -> None:
        logging.basicConfig(level=settings.log_level.upper())
        self._roster = roster
        self._name = serve.get_replica_context().replica_id.unique_id
        self._service = Service(settings, open_jobs, starts=())
        host = ray.util.get_node_ip_address()
        server, _ = start_http_server(0, host, self._service.metrics.registry)
        self._scraped = f"{host}:{server.server_port}"
        self._asking = Asking(self._ask)
        self._asking.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray once the replica is constructed. The application's lifespan starts and stops the service."""
        app = create_app(self._service)
        app.add_api_route("/metrics/targets", self._targets, include_in_schema=False)
        settle_heap()
        return app

    def _ask(self) -> None:
        work = self._service.fleet.work()
        listing: Listing = self._roster.front.remote(self._name, work, self._scraped).result(timeout_s=_ANSWER_SECONDS)
        engines = {
            name: partial(RemoteEngine, contact, listing.keys, self._name) for name, contact in listing.engines.items()
        }
        self._service.fleet.enlist(engines, listing.foreign)

    async def _targets(self, request: Request) -> JSONResponse:
        """Every front's metrics, as Prometheus' HTTP service discovery reads it."""
        return JSONResponse([{"targets": await self._roster.scraped.remote(), "labels": {"job": "rmd"}}])

    async def __del__(self) -> None:
        """Called by Ray when no request is left."""
        self._asking.stop()
        with contextlib.suppress(TimeoutError):  # the whole application ends, the roster first
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._roster.front_leaves.remote(self._name)
