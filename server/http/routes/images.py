"""``POST /v1/images/generations``."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Coroutine
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.core.faults import Fault, RequestError
from server.front.channel import EventChannel, next_event
from server.front.generation import FinishedPicture, GenerationSpec
from server.front.service import Service
from server.http.bodies import PicturesResponse
from server.http.keys import caller_of
from server.http.middleware import REQUEST_ID
from server.http.replies import image_reply
from server.http.resolve import choose_model, resolve
from server.http.schemas import ErrorReply, ImageReply, ImageRequest
from server.http.streaming import HELD, ImageEventStream, client_gone, until_disconnected

router = APIRouter(prefix="/v1/images", tags=["images"])

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 403, 404, 408, 409, 413, 429, 500, 503, 504)
}
_LONGEST_KEY = 256


@router.post("/generations", response_model=ImageReply, responses=_ERRORS)
async def create_image(body: ImageRequest, request: Request) -> Response:
    """Draw pictures, in one reply or as a stream of events."""
    service: Service = request.app.state.service
    service.check_accepting()
    if body.response_format is None and not body.stream and _reads_urls(body.model, service):
        body = body.model_copy(update={"response_format": "url"})
    spec = resolve(body, choose_model(body.model, service, films=False), service.settings)
    key = request.headers.get("idempotency-key")
    request_id = str(request.scope["state"][REQUEST_ID])
    account = caller_of(request).account
    if body.stream:
        if key is not None:
            raise RequestError(
                Fault.BAD_FIELD,
                "Idempotency-Key is not kept for streams; leave out one of the two.",
                param="Idempotency-Key",
            )
        channel = EventChannel(request.scope["state"].get(HELD))
        return ImageEventStream(service, body, service.submit(spec, channel.send, request_id, account), channel)
    base_url = service.settings.public_url or str(request.base_url)

    def draw() -> Coroutine[Any, Any, dict[str, Any]]:
        return _draw(service, body, spec, base_url, request_id, account)

    if key is None:
        return PicturesResponse(await _while_connected(request, draw()))
    check_idempotency_key(key)
    digest = hashlib.sha256(await request.body()).hexdigest()
    reply, replayed = await service.replies.run(account, key, digest, draw, lambda stored: _at_hand(service, stored))
    return PicturesResponse(reply, headers={"Idempotent-Replayed": "true"} if replayed else None)


def _reads_urls(model: str | None, service: Service) -> bool:
    """Whether a model is named by whose clients read ``url``, as OpenAI's models of that name send it."""
    return model in service.settings.aliases and str(model).startswith("dall-e")


def check_idempotency_key(key: str) -> None:
    """Raise 400 where a key is empty or too long."""
    if not 0 < len(key) <= _LONGEST_KEY:
        raise RequestError(
            Fault.BAD_FIELD, f"Idempotency-Key must have 1 to {_LONGEST_KEY} characters.", param="Idempotency-Key"
        )


async def _at_hand(service: Service, reply: dict[str, Any]) -> bool:
    """Whether every file that a reply links to can still be fetched."""
    names = [picture["url"].rpartition("/")[2] for picture in reply["data"] if picture.get("url")]
    return None not in await asyncio.gather(*map(service.pictures.find, names))


async def _draw(
    service: Service, body: ImageRequest, spec: GenerationSpec, base_url: str, request_id: str, account: str
) -> dict[str, Any]:
    """Admit, wait and reply. However this ends, nothing of the request stays in the queues."""
    channel = EventChannel()
    generation = service.submit(spec, channel.send, request_id, account)
    pictures: list[FinishedPicture] = []
    try:
        while len(pictures) < len(spec.seeds):
            event = await next_event(service, generation, channel, patience=3600.0)
            if isinstance(event, FinishedPicture):
                pictures.append(event)
    finally:
        service.cancel(generation, client_gone())
    generation.took(service.metrics.request_seconds, time.monotonic() - generation.arrived)
    return await image_reply(service.card(spec.model), service.pictures, body, generation, pictures, base_url)


async def _while_connected(request: Request, work: Any) -> dict[str, Any]:
    """Await ``work``, or cancel it and raise 499 where the client leaves first."""
    drawing: asyncio.Task[dict[str, Any]] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_disconnected(request.receive))
    try:
        await asyncio.wait({drawing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if drawing.done():
            return drawing.result()
        raise client_gone()
    finally:
        drawing.cancel()
        gone.cancel()
        await asyncio.gather(drawing, gone, return_exceptions=True)
