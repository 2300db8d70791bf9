"""The ASGI application: routes, error shapes, and the service's life."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server import playground
from server.core.faults import Fault, RequestError
from server.front.service import Service
from server.http.errors import error_response, fault_for_status, validation_error
from server.http.middleware import OUTCOME, Accounting, BoundBody, RefuseWhenFull, RequireKey
from server.http.routes import files, health, images, models, videos


def create_app(service: Service) -> FastAPI:
    """Return the application around a service; its lifespan starts and stops the service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="rmd",
        summary="Few-step, multi-resolution generation of pictures and films behind OpenAI's image and video APIs.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    for router in (images.router, videos.router, models.router, health.router, files.router, playground.router):
        app.include_router(router)
    app.add_exception_handler(RequestError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    # the last one added is the outermost
    app.add_middleware(BoundBody, max_bytes=service.settings.max_body_bytes)
    app.add_middleware(RefuseWhenFull, admission=service.admission, check_accepting=service.check_accepting)
    app.add_middleware(RequireKey, keys=service.keys)
    app.add_middleware(Accounting, metrics=service.metrics)
    return app


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
    path = request.url.path[:80]
    if fault is Fault.NOT_FOUND:
        text = f"There is no {request.method} {path} here; /docs lists the routes."
        return error_response(RequestError(fault, text, code="unknown_url"))
    if fault is Fault.WRONG_METHOD:
        allowed = (error.headers or {}).get("Allow", "")
        text = f"{path} does not take {request.method}; use {allowed or 'another method'}."
        return error_response(RequestError(fault, text, headers=dict(error.headers or {})))
    return error_response(RequestError(fault, f"{error.detail}.", headers=dict(error.headers or {})))
