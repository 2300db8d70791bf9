"""Server-Sent Events for ``stream: true``, and noticing that a client has gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.core.faults import Fault, RequestError
from server.front.channel import EventChannel, next_event
from server.front.generation import FinishedPicture, Generation, PartialPicture
from server.front.service import Service
from server.http.bodies import json_bytes
from server.http.errors import error_body
from server.http.middleware import OUTCOME
from server.http.replies import completed_event, partial_event
from server.http.schemas import ImageRequest

HELD = "held"
"""In a request's state: what its client has not read yet (:class:`Held`)."""
_HEARTBEAT_SECONDS = 10.0


def client_gone() -> RequestError:
    """Return the 499 that ends a request whose client has left."""
    return RequestError(Fault.CLIENT_GONE, "The client closed the connection.")


async def until_disconnected(receive: Receive) -> None:
    """Return once the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class ImageEventStream(Response):
    """Sends a generation's events as they come; cancels it where the client leaves.

    The generation is admitted before the reply starts, so 429 and 503 still have their own status. What fails later
    arrives as an ``error`` event in the usual shape, which the official client raises.
    """

    media_type = "text/event-stream"

    def __init__(self, service: Service, body: ImageRequest, generation: Generation, channel: EventChannel) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._service = service
        self._body = body
        self._generation = generation
        self._channel = channel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the stream."""
        state: dict[str, Any] = scope.setdefault("state", {})
        gone = asyncio.ensure_future(until_disconnected(receive))
        sending = asyncio.ensure_future(self._send_events(send))
        try:
            await asyncio.wait({gone, sending}, return_when=asyncio.FIRST_COMPLETED)
            state[OUTCOME] = sending.result() if sending.done() else Fault.CLIENT_GONE.value.outcome
        finally:
            gone.cancel()
            sending.cancel()
            self._service.cancel(self._generation, client_gone())
            await asyncio.gather(gone, sending, return_exceptions=True)

    async def _send_events(self, send: Send) -> str:
        """Send everything and return the outcome for the metrics."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        left = len(self._generation.spec.seeds)
        outcome = "completed"
        try:
            while left:
                event = await next_event(self._service, self._generation, self._channel, _HEARTBEAT_SECONDS)
                if event is None:
                    await send(_chunk(b": still drawing\n\n"))
                elif isinstance(event, PartialPicture):
                    await send(_event(partial_event(self._body, self._generation, event)))
                elif isinstance(event, FinishedPicture):
                    left -= 1
                    card = self._service.card(self._generation.spec.model)
                    await send(_event(completed_event(card, self._body, self._generation, event)))
            seconds = time.monotonic() - self._generation.arrived
            self._generation.took(self._service.metrics.request_seconds, seconds)
        except RequestError as error:
            outcome = error.fault.value.outcome
            await send(_event({"type": "error", **error_body(error)}, "error"))
        await send(_chunk(b"data: [DONE]\n\n"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return outcome


def _event(payload: Mapping[str, Any], name: str | None = None) -> Message:
    return _chunk(b"event: %s\ndata: %s\n\n" % ((name or payload["type"]).encode(), json_bytes(payload)))


def _chunk(content: bytes) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": True}
