"""``GET /openapi.json`` and ``GET /docs``: what is really answered."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse

_SCRIPTS = "https://cdn.jsdelivr.net"
_POLICY = (
    f"default-src 'none'; script-src {_SCRIPTS} 'unsafe-inline'; style-src {_SCRIPTS} 'unsafe-inline'; "
    "img-src data: https://fastapi.tiangolo.com; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_NEVER = "422"
_NEVER_SHAPES = ("HTTPValidationError", "ValidationError")


def add_docs(app: FastAPI) -> None:
    """Add the page, and leave out of its description the replies that FastAPI assumes and this server never gives."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop(_NEVER, None)
            for name in _NEVER_SHAPES:
                schema["components"]["schemas"].pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    async def page(request: Request) -> HTMLResponse:
        where = f"{request.scope['root_path']}{app.openapi_url}"
        reply = get_swagger_ui_html(openapi_url=where, title=app.title)
        reply.headers.update({"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"})
        return reply

    app.openapi = describe  # type: ignore[method-assign]  # FastAPI's own way of changing it
    app.add_route("/docs", page, include_in_schema=False)
