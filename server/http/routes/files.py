"""``GET /files/{name}``: pictures of response_format=url. The name is the key: nobody can guess it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.core.faults import Fault, RequestError
from server.front.media import MEDIA_TYPES
from server.front.service import Service
from server.http.schemas import ErrorReply
from server.http.stored import kept_reply

router = APIRouter(tags=["files"])


@router.get("/files/{name}", responses={status: {"model": ErrorReply} for status in (404, 412, 416, 503)})
@router.head("/files/{name}", include_in_schema=False)
async def get_file(name: str, request: Request) -> Response:
    """Return one stored picture, whichever server made it; 404 once it has expired. Takes Range requests."""
    service: Service = request.app.state.service
    found = await service.pictures.find(name)
    try:
        if found is None:
            raise FileNotFoundError(name)
        return await kept_reply(
            service.objects,
            found[0],
            request,
            media_type=MEDIA_TYPES[name.rpartition(".")[2]],
            seconds_left=found[1],
            presigned_seconds=service.settings.presigned_seconds,
        )
    except FileNotFoundError:
        text = "This picture has expired or never was here; generate it again."
        raise RequestError(Fault.NOT_FOUND, text) from None
