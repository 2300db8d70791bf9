"""What a request's path means, however it was written or forwarded."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

PROBES = ("/health/live", "/health/ready", "/metrics", "/metrics/targets")  # the last: deploy/ray
"""Asked every few seconds by machines that have no key and know no name."""

_SLASHES = re.compile("/{2,}")
_ABSOLUTE = re.compile(r"^https?://[^/]*", re.IGNORECASE)


def route_path(scope: Scope) -> str:
    """Return the path below ``root_path``, such as "/v1/models"; never empty."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


class CleanPath:
    """Outermost: gives every request one spelling of its path, below ``root_path``.

    Base URLs with a slash at their end make double ones, and clients behind a forward proxy send whole URLs. A proxy
    may serve this server below a prefix, and pass that prefix on or not: probes and neighbours come without it.

    Args:
        root_path: the prefix, such as "/rmd"; empty for none.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self.app = app
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application inside."""
        if scope["type"] == "http":
            path = _SLASHES.sub("/", _ABSOLUTE.sub("", scope["path"])).rstrip("/")
            if path == self.root_path or path.startswith(f"{self.root_path}/"):
                path = path.removeprefix(self.root_path)
            scope = {**scope, "root_path": self.root_path, "path": f"{self.root_path}{path or '/'}"}
        await self.app(scope, receive, send)
