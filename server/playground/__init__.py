"""The page at ``/``: type a prompt, watch the cascade draw. Three static files, which only call the public API."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent
_HEADERS = {
    # Nothing is loaded from elsewhere, and no other site may frame the page to borrow its key.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; media-src blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def page() -> FileResponse:
    """Return the page."""
    return FileResponse(_FOLDER / "index.html", headers=_HEADERS)


@router.get("/playground/script.js")
async def script() -> FileResponse:
    """Return what it does."""
    return FileResponse(_FOLDER / "script.js", media_type="text/javascript", headers=_HEADERS)


@router.get("/playground/style.css")
async def style() -> FileResponse:
    """Return how it looks."""
    return FileResponse(_FOLDER / "style.css", headers=_HEADERS)
