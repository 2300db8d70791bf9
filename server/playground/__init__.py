"""The page at ``/``: type a prompt, watch the cascade draw. Static files, which only call the public API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent
_MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_HEADERS = {
    # Nothing is loaded from elsewhere, and no other site may frame the page to borrow its key. Pictures and films are
    # blobs, made in the page from replies; "data:" is the empty icon.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src blob: data:; "
        "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _sender(file: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def send() -> FileResponse:
        return FileResponse(file, media_type=_MEDIA_TYPES[file.suffix], headers=_HEADERS)

    return send


# One route a file, so that no part of a path is ever looked up in the folder.
_METHODS = ["GET", "HEAD"]
router.add_api_route("/", _sender(_FOLDER / "index.html"), methods=_METHODS)
for _file in sorted(_FOLDER.iterdir()):
    if _file.suffix in (".js", ".css"):
        router.add_api_route(f"/playground/{_file.name}", _sender(_file), methods=_METHODS, name=_file.name)
