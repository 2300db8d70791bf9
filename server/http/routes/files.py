"""``GET /files/{name}``: pictures of response_format=url. The name is the key: nobody can guess it."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.core.faults import Fault, RequestError
from server.front.service import Service
from server.http.schemas import ErrorReply
from server.http.stored import conditional, headers_of

router = APIRouter(tags=["files"])


@router.get("/files/{name}", responses={404: {"model": ErrorReply}})
@router.head("/files/{name}", include_in_schema=False)
async def get_file(name: str, request: Request) -> Response:
    """Return one stored picture; 404 once it has expired."""
    service: Service = request.app.state.service
    stored = service.files.get(name)
    if stored is None:
        raise RequestError(Fault.NOT_FOUND, "This picture has expired or never was here; generate it again.")
    headers = {**headers_of(stored.expires_at - time.monotonic()), "ETag": stored.etag}
    return conditional(Response(stored.content, media_type=stored.media_type, headers=headers), request.headers)
