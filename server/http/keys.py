"""Who calls, and whether it may now: before a body is looked at."""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.core.faults import RequestError
from server.front.auth import Caller, KeyRing
from server.front.quotas import Quotas
from server.http.errors import error_response
from server.http.incoming import discard
from server.http.paths import route_path

CALLER = "caller"


class RequireKey:
    """Refuses calls to /v1 without a known key, and requests for work beyond the key's quota."""

    def __init__(self, app: ASGIApp, keys: KeyRing, quotas: Quotas) -> None:
        self.app = app
        self.keys = keys
        self.quotas = quotas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key, then run the application inside."""
        path = route_path(scope) if scope["type"] == "http" else ""
        with ExitStack() as held:
            if path == "/v1" or path.startswith("/v1/"):
                try:
                    caller = self.keys.caller(Headers(scope=scope).get("authorization"))
                    scope.setdefault("state", {})[CALLER] = caller
                    if scope["method"] == "POST":
                        held.enter_context(self.quotas.request(caller))
                except RequestError as error:
                    await discard(receive)
                    await error_response(error)(scope, receive, send)
                    return
            await self.app(scope, receive, send)


def caller_of(request: Request) -> Caller:
    """Return who sent a request to /v1."""
    caller: Caller = request.scope["state"][CALLER]
    return caller
