"""Requests' bodies: bounded in bytes and in time."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.core.faults import Fault, RequestError
from server.http.errors import error_response

CLIENT_PATIENCE_SECONDS = 30.0
"""How long a client may take over its head, over its body, or over reading one event: none may hold memory for ever."""
_MOST_DISCARDED = 32 * 1024 * 1024


async def discard(receive: Receive) -> None:
    """Read and drop what the client is still sending, up to a bound in bytes and in time."""
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLIENT_PATIENCE_SECONDS):
            while dropped < _MOST_DISCARDED:
                message = await receive()
                dropped += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


class BoundBody:
    """Reads a request's body, at most ``max_bytes`` of it; longer ones get 413 without being kept.

    A declared length above the bound is refused before a byte is read. What the client still sends is discarded,
    since most clients only look at the reply once they have sent everything.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then run the application inside."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        body = b""
        too_long = declared.isdecimal() and int(declared[:18]) > self.max_bytes
        more = True
        try:
            async with asyncio.timeout(CLIENT_PATIENCE_SECONDS):
                while more and not too_long:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = bool(message.get("more_body"))
                    too_long = len(body) > self.max_bytes
        except TimeoutError:
            text = f"The body did not arrive within {CLIENT_PATIENCE_SECONDS:g} seconds."
            await error_response(RequestError(Fault.SLOW_BODY, text))(scope, receive, send)
            return
        if too_long:
            if more:
                await discard(receive)
            form = Headers(scope=scope).get("content-type", "").lower().startswith("multipart/")
            advice, param = ("send texts, no files", None) if form else ("shorten the prompt", "prompt")
            error = RequestError(
                Fault.TOO_LARGE, f"The body is longer than {self.max_bytes} bytes; {advice}.", param=param
            )
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a receive that gives the body once, then whatever the connection says (a disconnect)."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
