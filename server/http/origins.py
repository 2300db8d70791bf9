"""Which web pages may use this server.

A browser lets any page send requests to any address, this machine's included: plain forms need no leave, and a page
whose name is made to point here (DNS rebinding) may read the replies too. Both carry names that are not ours, in
``Host`` or in ``Origin``. Whoever is no browser may write there what it likes: keys are against those.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.core.faults import Fault, RequestError
from server.core.promises import in_a_while
from server.http.errors import error_response
from server.http.incoming import discard
from server.http.paths import PROBES, route_path

ANY = "*"
CROWDED = "crowded"
"""In a connection's state: no connection is left but those kept for probes."""

_SAFE = ("GET", "HEAD")
_NO_HOST = re.compile(r"[/?#@\\]")  # a name and a port hold none, and URL parsers differ over which part is the name
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class CheckDoor:
    """Refuses, before anything is read: foreign names and pages, ambiguous bodies, and all but probes in a crowd.

    Args:
        hosts: names under which this server is called, beside IP addresses and localhost; "*.example.org" are all of
            a domain, "*" any name.
        origins: of the pages that may use it beside its own, such as "https://example.org"; "*" any.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        self.app = app
        self.hosts = frozenset(host.lower() for host in hosts)
        self.origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or run the application inside."""
        if scope["type"] == "http":
            try:
                self._check(scope, Headers(scope=scope))
            except RequestError as error:
                await discard(receive)
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        path = route_path(scope)
        if scope.get("state", {}).get(CROWDED) and path not in PROBES:
            text = "The server has as many connections as it can hold."
            raise RequestError(Fault.NOT_READY, text, retry_after=in_a_while(5), headers={"Connection": "close"})
        if "transfer-encoding" in headers and "content-length" in headers:
            # RFC 9112, 6.1: two servers in a row may disagree where such a request ends, and the next one begins.
            text = "A request may have a Content-Length or a Transfer-Encoding, not both."
            raise RequestError(Fault.BAD_FIELD, text, code="ambiguous_length", headers={"Connection": "close"})
        if path in PROBES:
            return
        host = headers.get("host")
        if host is not None and not _known(host, self.hosts):
            raise RequestError(
                Fault.FOREIGN_PAGE,
                f"This server does not go by the name '{host[:80]}': without API keys it answers to IP addresses and "
                "localhost alone. Add the name to allowed_hosts, or set api_keys.",
                code="unknown_host",
            )
        if path == "/v1" or path.startswith("/v1/") or scope["method"] not in _SAFE:
            self._check_page(headers)

    def _check_page(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None:
            # Browsers leave it out of links and pictures, and say where those stand instead, if the address is safe.
            foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        else:
            foreign = not (_same_place(origin, headers.get("host", "")) or {ANY, origin} & self.origins)
        if foreign:
            raise RequestError(
                Fault.FOREIGN_PAGE,
                "Pages of other sites may not use this server. Add the page's origin to allowed_origins; behind a "
                "proxy that hides the Host header, that of this server's own pages.",
            )


def _known(host: str, hosts: Collection[str]) -> bool:
    if _NO_HOST.search(host):
        return False
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if ANY in hosts or name in hosts or name == "localhost" or name.endswith(".localhost"):
        return True
    if any(pattern.startswith("*.") and name.endswith(pattern[1:]) for pattern in hosts):
        return True
    try:
        ipaddress.ip_address(name)  # no name, so none that could be made to point here
    except ValueError:
        return False
    return True


def _same_place(origin: str, host: str) -> bool:
    """Whether an origin such as "https://example.org" is that of this server's own pages. "null" never is."""
    scheme, _, authority = origin.lower().partition("://")
    port = _DEFAULT_PORTS.get(scheme, "")
    return bool(authority) and authority.removesuffix(port) == host.lower().removesuffix(port)
