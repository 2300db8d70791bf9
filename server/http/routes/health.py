"""Liveness, readiness and metrics. None asks for a key: probes and scrapers have none."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.front.service import Service, State
from server.telemetry.metrics import CONTENT_TYPE

router = APIRouter(tags=["health"])


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.get("/health/live")
async def live(request: Request) -> JSONResponse:
    """200 while the process can still become or stay useful: restart it otherwise."""
    service = _service(request)
    if service.alive:
        return JSONResponse({"status": "live"})
    return JSONResponse({"status": "dead", "reason": service.failure or "the device thread has ended"}, 503)


@router.get("/health/ready")
async def ready(request: Request) -> JSONResponse:
    """200 where every engine is loaded and warmed and requests are accepted; else 503 with the reason."""
    service = _service(request)
    state = service.state
    body: dict[str, Any] = {"status": state.value}
    if state is State.LOADING:
        progress = service.progress
        body["progress"] = {"done": progress.done, "total": progress.total, "text": progress.text}
    if service.failure:
        body["reason"] = service.failure
    usable = state is State.READY and service.alive
    return JSONResponse(body, 200 if usable else 503, headers={} if usable else {"Retry-After": "5"})


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request) -> Response:
    """Prometheus' text format. A plain function: it runs in a worker thread, off the event loop."""
    return Response(_service(request).metrics.render(), media_type=CONTENT_TYPE)
