"""What surrounds every route: request ids, counting and the access log, the last catch, and early refusals.

Plain ASGI, no buffering of replies: streams and disconnects pass straight through.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.core.admission import Admission
from server.core.faults import Fault, RequestError
from server.core.promises import in_a_while
from server.front.auth import Caller
from server.http.errors import error_response, outcome_of_status
from server.http.incoming import discard
from server.http.keys import CALLER
from server.http.paths import PROBES, route_path
from server.telemetry.facts import CURRENT, RequestFacts
from server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from server.telemetry.tracing import Tracing

log = logging.getLogger("rmd.server")
access_log = logging.getLogger("rmd.access")

OUTCOME = "rmd.outcome"
REQUEST_ID = "request_id"
_PICTURES = "/v1/images/generations"
_FROM_PICTURES = ("/v1/images/edits", "/v1/images/variations")
_ROUTES = (
    "/", "/playground", "/v1/images/generations", "/v1/videos", "/v1/models", "/health/live", "/health/ready",
    "/metrics", "/docs", "/files",
)  # fmt: skip


class Accounting:
    """Gives each request an id and a span, counts and logs how it ended, and turns what nobody caught into a 500.

    Args:
        tracing: None where nothing is traced.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self.app = app
        self.metrics = metrics
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application inside."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = route_path(scope)
        facts = RequestFacts(uuid.uuid4().hex)
        if self.tracing is not None and path not in PROBES:
            facts.span = self.tracing.serve(Headers(scope=scope), scope["method"], _route(path), facts.request_id)
        told = {"x-request-id": facts.request_id, **(facts.span.carrier() if facts.span is not None else {})}
        CURRENT.set(facts)
        status, begun = 0, time.monotonic()

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(told)
            await send(message)

        state = scope.setdefault("state", {})
        state[REQUEST_ID] = facts.request_id
        try:
            await self.app(scope, receive, watched_send)
        except asyncio.CancelledError:  # the server stops and waits no longer
            state[OUTCOME] = Fault.DRAINING.value.outcome
            if not status:
                stopping = RequestError(Fault.DRAINING, "The server is stopping.", retry_after=in_a_while(5))
                await error_response(stopping)(scope, receive, watched_send)
            raise
        except Exception:
            log.exception("request %s raised", facts.request_id)
            state[OUTCOME] = Fault.INTERNAL.value.outcome
            if status:
                raise  # too late for a status: close the connection, so that the client sees a broken reply
            error = RequestError(
                Fault.INTERNAL, "Something broke while answering; the server's log has this request's id."
            )
            await error_response(error)(scope, receive, watched_send)
        finally:
            status = status or Fault.CLIENT_GONE.value.status
            outcome = state.get(OUTCOME) or outcome_of_status(status)
            caller: Caller = state.get(CALLER, Caller())
            self.metrics.requests.labels(_route(path), outcome).inc()
            if caller.name:
                self.metrics.key_requests.labels(caller.name, outcome).inc()
            if path not in PROBES:  # they come every few seconds and say nothing
                _log_access(scope, path, caller.name, status, outcome, time.monotonic() - begun, facts)
            if facts.trace is not None:
                facts.trace.replied()
            if facts.span is not None:
                facts.span.end(status, outcome)


class RefuseEarly:
    """Refuses before bodies are parsed: what is asked of pictures, and pictures while no place is free.

    A crowd must cost little.
    """

    def __init__(self, app: ASGIApp, admission: Admission, check_accepting: Callable[[], None]) -> None:
        self.app = app
        self.admission = admission
        self.check_accepting = check_accepting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or run the application inside."""
        if scope["type"] == "http":
            try:
                self._check(scope)
            except RequestError as error:
                scope.setdefault("state", {})[OUTCOME] = error.fault.value.outcome
                await discard(receive)
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        path = route_path(scope)
        if path in _FROM_PICTURES:
            raise RequestError(
                Fault.NOT_FOUND,
                f"{path} is not served: this server draws from text alone, by POST {_PICTURES}.",
                code="unsupported_endpoint",
            )
        # A repeated request may have its reply already, whatever the queue holds.
        if path == _PICTURES and self.admission.full and "idempotency-key" not in Headers(scope=scope):
            self.check_accepting()
            self.admission.acquire(1, 0).release()


def _log_access(
    scope: Scope, path: str, key: str, status: int, outcome: str, seconds: float, facts: RequestFacts
) -> None:
    """Say who, what, how it ended and how long it took. Never the query, which may hold a key by mistake."""
    line: dict[str, Any] = {
        "client": (scope.get("client") or ("-",))[0],
        "key": key or "-",
        "method": scope["method"],
        "path": quote(path),
        "status": status,
        "outcome": outcome,
        "seconds": round(seconds, 6),
        **facts.ids,
        **({"model": facts.model, "schedule": facts.schedule} if facts.model else {}),
        **{f"{what}_seconds": took for what, took in facts.seconds.items()},
    }
    more = "".join(f" {name}={value}" for name, value in list(line.items())[8:])
    access_log.info(
        '%(client)s %(key)s "%(method)s %(path)s" %(status)d %(outcome)s %(seconds).3fs %(request_id)s%(more)s',
        {**line, "more": more},
        extra={"facts": line},
    )


def _route(path: str) -> str:
    """Return a label from a fixed set, so that probing paths cannot grow the metrics."""
    if path.startswith("/v1/videos/"):
        return "/v1/videos/{id}"  # polls, which would drown the jobs that are asked for
    for known in _ROUTES:
        if path == known or path.startswith(known + "/"):
            return known
    return "other"
