"""Replies that hold what is kept: conditional requests, ranges, and how long it will be there (RFC 9110, 13 and 14)."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from email.utils import format_datetime, parsedate_to_datetime

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from server.core.faults import Fault, RequestError
from server.http.errors import error_response
from server.objects.store import KeptObject, Objects

_KEPT_OF_304 = ("cache-control", "etag", "last-modified")
_PIECE_BYTES = 1 << 20
_SPAN = re.compile(r"(\d*)-(\d*)", re.ASCII)
_DIGITS = 19  # so many are beyond every file


def headers_of(seconds_left: float) -> dict[str, str]:
    """Return the headers of what one client may keep, at most an hour, for as long as it is kept here."""
    age = max(min(int(seconds_left), 3600), 0)
    return {"Cache-Control": f"private, max-age={age}", "X-Content-Type-Options": "nosniff"}


def conditional(reply: Response, headers: Headers) -> Response:
    """Return the reply that the request's conditions lead to: ``reply`` itself, a 304 or a 412.

    Args:
        reply: has an ETag, and may have a Last-Modified.
        headers: the request's, of a GET or HEAD.
    """
    etag, modified = reply.headers["etag"], reply.headers.get("last-modified")
    if "if-match" in headers:
        failed = not _names(headers["if-match"], etag, strong=True)
    else:
        failed = _later(modified, headers.get("if-unmodified-since"))
    if failed:
        text = "What is kept here is not what the request's conditions name."
        return error_response(RequestError(Fault.NOT_AS_ASKED, text, headers={"ETag": etag}))
    if "if-none-match" in headers:
        known = _names(headers["if-none-match"], etag, strong=False)
    else:
        since = headers.get("if-modified-since")
        known = modified is not None and _date(since) is not None and not _later(modified, since)
    if known:
        kept = {name: reply.headers[name] for name in _KEPT_OF_304 if name in reply.headers}
        return Response(status_code=304, headers=kept)
    return reply


async def kept_reply(
    objects: Objects,
    found: KeptObject,
    request: Request,
    *,
    media_type: str,
    seconds_left: float,
    filename: str | None = None,
    presigned_seconds: float = 0.0,
) -> Response:
    """Return the reply that sends an object, the part of it that is asked for, or why not.

    Args:
        seconds_left: how long it will be there.
        filename: what it is to be saved as.
        presigned_seconds: send the client to the store itself, by a link that is good for so long; 0: never.

    Raises:
        FileNotFoundError: it is gone by now.
        StoreError: the store does not give it.
    """
    headers = {
        **headers_of(seconds_left),
        "ETag": found.etag,
        "Last-Modified": format_datetime(found.modified, usegmt=True),
        "Accept-Ranges": "bytes",
    }
    if filename is not None:
        headers["Content-Disposition"] = f'attachment; filename="{filename}"'
    whole = Response(media_type=media_type, headers={**headers, "Content-Length": str(found.size)})
    answer = conditional(whole, request.headers)
    if answer is not whole:
        return answer
    if presigned_seconds:
        link = objects.sign(found.name, request.method, min(presigned_seconds, seconds_left))
        return RedirectResponse(link, 307, headers={"Cache-Control": "no-store"})
    if request.method == "HEAD":
        return whole
    part = _range_of(request.headers, found)
    begin, end = part or (0, found.size)
    if part is not None:
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{found.size}"
    first = await objects.read(found, begin, min(begin + _PIECE_BYTES, end)) if end else b""

    async def pieces() -> AsyncIterator[bytes]:
        yield first
        for at in range(begin + _PIECE_BYTES, end, _PIECE_BYTES):
            yield await objects.read(found, at, min(at + _PIECE_BYTES, end))

    headers["Content-Length"] = str(end - begin)
    return StreamingResponse(pieces(), 206 if part else 200, headers, media_type)


def _range_of(headers: Headers, found: KeptObject) -> tuple[int, int] | None:
    """Return the bytes that are asked for, as (first, last + 1); None: all. A list of ranges is ignored, as it may be.

    Raises:
        RequestError: 416.
    """
    asked = headers.get("range", "")
    unit, _, spans = asked.partition("=")
    if unit.strip().lower() != "bytes" or "," in spans:
        return None
    condition = headers.get("if-range")
    if condition is not None and condition not in (found.etag, format_datetime(found.modified, usegmt=True)):
        return None
    given = _SPAN.fullmatch(spans.strip())
    if given is not None and given[1]:
        begin, end = _position(given[1]), min(_position(given[2]) + 1 if given[2] else found.size, found.size)
    elif given is not None and given[2]:
        begin, end = max(found.size - _position(given[2]), 0), found.size
    else:
        begin = end = 0
    if begin < end:
        return begin, end
    text = f"The range '{asked[:80]}' is none of a file of {found.size} bytes."
    raise RequestError(Fault.BAD_RANGE, text, headers={"Content-Range": f"bytes */{found.size}"})


def _position(digits: str) -> int:
    """Return a position in a file; of one beyond every file the first digits (Python reads no number of 5,000)."""
    return int(digits.lstrip("0")[:_DIGITS] or "0")


def _names(tags: str, etag: str, *, strong: bool) -> bool:
    """Whether a list names a tag; to a strong comparison weak tags are nobody's (RFC 9110, 8.8.3.2)."""
    if tags.strip() == "*":
        return True
    named = [tag.strip() for tag in tags.split(",")]
    if strong:
        return etag in named and not etag.startswith("W/")
    return etag.removeprefix("W/") in (tag.removeprefix("W/") for tag in named)


def _date(text: str | None) -> float | None:
    try:
        return parsedate_to_datetime(text or "").timestamp()
    except (ValueError, OverflowError):  # the latter of an hour of twenty digits, say
        return None


def _later(modified: str | None, than: str | None) -> bool:
    """Whether the first of two HTTP dates is the later one; False where one of them is none."""
    first, second = _date(modified), _date(than)
    return first is not None and second is not None and first > second
