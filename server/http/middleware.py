"""What surrounds every route: request ids and counting, the last catch, keys, and the bound on bodies.

Plain ASGI, no buffering of replies: streams and disconnects pass straight through.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.core.admission import Admission
from server.core.faults import Fault, RequestError
from server.front.auth import KeyRing
from server.http.errors import error_response, outcome_of_status
from server.telemetry.metrics import Metrics

log = logging.getLogger("rmd.server")

OUTCOME = "rmd.outcome"
REQUEST_ID = "request_id"
CLIENT_PATIENCE_SECONDS = 30.0
"""How long a client may take over its body, or over reading one event: a connection must not hold memory for ever."""
_MOST_DISCARDED = 32 * 1024 * 1024
_PICTURES = "/v1/images/generations"
_ROUTES = (
    "/", "/playground", "/v1/images/generations", "/v1/videos", "/v1/models", "/health/live", "/health/ready",
    "/metrics", "/docs", "/files",
)  # fmt: skip


class Accounting:
    """Outermost: gives each request an id, counts how it ended, and turns what nobody caught into a 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application inside."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        status = 0

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        state = scope.setdefault("state", {})
        state[REQUEST_ID] = request_id
        try:
            await self.app(scope, receive, watched_send)
        except asyncio.CancelledError:  # the server stops and waits no longer
            state[OUTCOME] = Fault.DRAINING.value.outcome
            if not status:
                stopping = RequestError(Fault.DRAINING, "The server is stopping.", retry_after=5)
                await error_response(stopping)(scope, receive, watched_send)
            raise
        except Exception:
            log.exception("request %s raised", request_id)
            state[OUTCOME] = Fault.INTERNAL.value.outcome
            if status:
                raise  # too late for a status: close the connection, so that the client sees a broken reply
            error = RequestError(
                Fault.INTERNAL, "Something broke while answering; the server's log has this request's id."
            )
            await error_response(error)(scope, receive, watched_send)
        finally:
            outcome = state.get(OUTCOME) or outcome_of_status(status or 499)
            if outcome == Fault.CLIENT_GONE.value.outcome:
                log.info("request %s: its client left", request_id)
            self.metrics.requests.labels(_route(scope["path"]), outcome).inc()


class RequireKey:
    """Refuses calls to /v1 without a known key, before their body is looked at."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key, then run the application inside."""
        if scope["type"] == "http" and (scope["path"] == "/v1" or scope["path"].startswith("/v1/")):
            headers = Headers(scope=scope)
            try:
                # Only browsers send it. Otherwise any page that is open beside a server without keys could order films
                # from it: a form needs no leave.
                if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
                    raise RequestError(Fault.FOREIGN_PAGE, "Pages of other sites may not use this server.")
                self.keys.check(headers.get("authorization"))
            except RequestError as error:
                await _discard(receive)
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class RefuseWhenFull:
    """Refuses requests for pictures before their bodies are parsed while no place is free: a crowd must cost little."""

    def __init__(self, app: ASGIApp, admission: Admission, check_accepting: Callable[[], None]) -> None:
        self.app = app
        self.admission = admission
        self.check_accepting = check_accepting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or run the application inside."""
        # A repeated request may have its reply already, whatever the queue holds.
        if scope["type"] == "http" and scope["path"] == _PICTURES and "idempotency-key" not in Headers(scope=scope):
            try:
                if self.admission.full:
                    self.check_accepting()
                    self.admission.acquire(1, 0).release()
            except RequestError as error:
                scope.setdefault("state", {})[OUTCOME] = error.fault.value.outcome
                await _discard(receive)
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


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
                await _discard(receive)
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


async def _discard(receive: Receive) -> None:
    """Read and drop what the client is still sending, up to a bound in bytes and in time."""
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLIENT_PATIENCE_SECONDS):
            while dropped < _MOST_DISCARDED:
                message = await receive()
                dropped += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


def _route(path: str) -> str:
    """Return a label from a fixed set, so that probing paths cannot grow the metrics."""
    if path.startswith("/v1/videos/"):
        return "/v1/videos/{id}"  # polls, which would drown the jobs that are asked for
    for known in _ROUTES:
        if path == known or path.startswith(known + "/"):
            return known
    return "other"
