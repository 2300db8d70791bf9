"""The ASGI application: routes, error shapes, and the service's life."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import Histogram
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match

from server import playground
from server.core.faults import Fault, RequestError
from server.front.service import Service
from server.http.errors import error_response, fault_for_status, validation_error
from server.http.incoming import BoundBody
from server.http.keys import RequireKey
from server.http.middleware import OUTCOME, Accounting, RefuseEarly
from server.http.openapi import add_docs
from server.http.origins import CheckDoor
from server.http.paths import CleanPath, route_path
from server.http.routes import files, health, images, models, videos

_EXPOSED = (
    "idempotent-replayed",
    "openai-poll-after-ms",
    "retry-after",
    "traceparent",
    "x-request-id",
    "x-should-retry",
)
"""Headers that a page of an allowed origin may read."""

_LAG_SECONDS = 0.25


def create_app(service: Service) -> FastAPI:
    """Return the application around a service; its lifespan starts and stops the service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        watching = asyncio.create_task(_watch_loop(service.metrics.loop_lag_seconds))
        yield
        watching.cancel()
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="rmd",
        summary="Few-step, multi-resolution generation of pictures and films behind OpenAI's image and video APIs.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        # Its own would tell queries, which may hold a key by mistake, and what of a body is wrong: a prompt perhaps.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.service = service
    for router in (images.router, videos.router, models.router, health.router, files.router, playground.router):
        app.include_router(router)
    add_docs(app)
    app.add_exception_handler(RequestError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    # the last one added is the outermost
    app.add_middleware(BoundBody, max_bytes=service.settings.max_body_bytes)
    app.add_middleware(RefuseEarly, admission=service.admission, check_accepting=service.check_accepting)
    app.add_middleware(RequireKey, keys=service.keys, quotas=service.quotas)
    settings = service.settings
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=_EXPOSED,
        )
    app.add_middleware(CheckDoor, hosts=settings.known_hosts, origins=settings.known_origins)
    app.add_middleware(Accounting, metrics=service.metrics, tracing=service.tracing)
    app.add_middleware(CleanPath, root_path=settings.root_path)
    return app


async def _watch_loop(lag: Histogram) -> None:
    """Observe how late this loop wakes a task, as long as it runs."""
    while True:
        due = time.monotonic() + _LAG_SECONDS
        await asyncio.sleep(_LAG_SECONDS)
        lag.observe(max(time.monotonic() - due, 0.0))


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    request.scope.setdefault("state", {})[OUTCOME] = error.fault.value.outcome
    return error_response(error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(validation_error(error.errors()))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Give unknown routes, wrong methods and unreadable bodies the one error shape."""
    assert isinstance(error, HTTPException)
    fault = fault_for_status(error.status_code)
    path = route_path(request.scope)[:80]
    if fault is Fault.NOT_FOUND:
        text = f"There is no {request.method} {path} here; /docs lists the routes."
        return error_response(RequestError(fault, text, code="unknown_url"))
    if fault is Fault.WRONG_METHOD:
        allowed = _methods_of(request)
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": allowed})
        text = f"{path} does not take {request.method}; use {allowed}."
        return error_response(RequestError(fault, text, headers={"Allow": allowed}))
    return error_response(RequestError(fault, f"{error.detail}.", headers=dict(error.headers or {})))


def _methods_of(request: Request) -> str:
    """Return what all routes of a path take together, for the Allow header."""

    def taken(method: str) -> bool:
        asked = {**request.scope, "method": method}
        return any(route.matches(asked)[0] is Match.FULL for route in request.app.routes)

    return ", ".join(method for method in ("DELETE", "GET", "HEAD", "POST") if taken(method))
