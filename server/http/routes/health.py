"""Liveness, readiness and metrics. None asks for a key: probes and scrapers have none."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.core.stages import ALL, name_of
from server.front.service import Service, State

router = APIRouter(tags=["health"])

_SCRAPES = ThreadPoolExecutor(1, thread_name_prefix="rmd-metrics")


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.get("/health/live")
@router.head("/health/live", include_in_schema=False)
async def live(request: Request) -> JSONResponse:
    """200 while the process can still become or stay useful: restart it otherwise."""
    service = _service(request)
    if service.alive:
        return JSONResponse({"status": "live"})
    return JSONResponse({"status": "dead", "reason": service.failure or "no engine is left"}, 503)


@router.get("/health/ready")
@router.head("/health/ready", include_in_schema=False)
async def ready(request: Request) -> JSONResponse:
    """200 where an engine is warm and requests are accepted; else 503 with the reason. Says what is compiled."""
    service = _service(request)
    state, is_ready = service.state, service.ready
    lacking = None if is_ready or state is not State.READY else _lacking(service)
    body: dict[str, Any] = {"status": state.value if lacking is None else "unavailable"}
    if state is State.LOADING:
        progress = service.progress
        body["progress"] = {"done": progress.done, "total": progress.total, "text": progress.text}
    else:
        body["engines"] = [
            {
                "device": each.device,
                "status": each.health.value,
                "restarts": each.restarts,
                "reason": each.reason,
                **({} if each.stages == ALL else {"stages": name_of(each.stages)}),
            }
            for each in service.fleet.members
        ]
    compiled = {label: widths for card in service.fleet.cards.values() for label, widths in card.compiled.items()}
    if compiled:
        body["stations"] = {label: "compiled" if widths else "eager" for label, widths in compiled.items()}
    if service.missing:
        body["not_loaded"] = dict(service.missing)
    building = service.builder.progress
    if building is not None:
        left = building.remaining
        body["building"] = {
            "done": building.done,
            "total": building.total,
            "text": building.current,
            "seconds_left": None if left is None else round(left),
        }
    if service.builder.failure:
        body["not_built"] = service.builder.failure
    if service.database.fault:
        body["database"] = service.database.fault
    if service.failure or lacking:
        body["reason"] = service.failure or lacking
    return JSONResponse(body, 200 if is_ready else 503, headers={} if is_ready else {"Retry-After": "5"})


def _lacking(service: Service) -> str:
    """Return why a server that has loaded is not ready."""
    if service.database.fault:
        return f"the database fails: {service.database.fault}"
    if service.film_jobs is not None and not service.film_jobs.alive:
        return "the thread of the video jobs has ended: no film is made until the process is restarted"
    lacking = service.fleet.members.lacking
    return f"no engine works{'' if lacking == ALL else f' at {name_of(lacking)}'} at the moment; see engines"


@router.get("/metrics", include_in_schema=False)
@router.head("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """Prometheus' text format, or OpenMetrics, in a thread of its own: others may all be waiting for the database."""
    render = partial(_service(request).metrics.render, request.headers.get("accept", ""))
    content, media_type = await asyncio.get_running_loop().run_in_executor(_SCRAPES, render)
    return Response(content, headers={"Content-Type": media_type})
