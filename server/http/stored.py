"""Replies that hold what is kept: conditional requests, ranges, and how long it will be there (RFC 9110, 13 and 14)."""

from __future__ import annotations

from email.utils import parsedate_to_datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from server.core.faults import Fault, RequestError
from server.http.errors import error_response

_KEPT_OF_304 = ("cache-control", "etag", "last-modified")


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
        failed = not _names(headers["if-match"], etag)
    else:
        failed = _later(modified, headers.get("if-unmodified-since"))
    if failed:
        text = "What is kept here is not what the request's conditions name."
        return error_response(RequestError(Fault.NOT_AS_ASKED, text, headers={"ETag": etag}))
    if "if-none-match" in headers:
        known = _names(headers["if-none-match"], etag)
    else:
        since = headers.get("if-modified-since")
        known = modified is not None and _date(since) is not None and not _later(modified, since)
    if known:
        kept = {name: reply.headers[name] for name in _KEPT_OF_304 if name in reply.headers}
        return Response(status_code=304, headers=kept)
    return reply


class KeptFile(FileResponse):
    """A file whose errors have the one shape."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file, or the part of it that is asked for."""
        headers = MutableHeaders(scope=scope)
        if headers.get("range", "bytes=").partition("=")[0].strip().lower() != "bytes":  # to be ignored, not refused
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"range"]}
        refused = False

        async def shaped(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                refused = True
                given = headers.get("range", "")[:80]
                kept = {key: value for key, value in Headers(scope=message).items() if key == "content-range"}
                text = f"The range '{given}' is none of a file of {self.headers['content-length']} bytes."
                await error_response(RequestError(Fault.BAD_RANGE, text, headers=kept))(scope, receive, send)
            elif not refused:
                await send(message)

        await super().__call__(scope, receive, shaped)


def _names(tags: str, etag: str) -> bool:
    return tags.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in tags.split(","))


def _date(text: str | None) -> float | None:
    try:
        return parsedate_to_datetime(text or "").timestamp()
    except ValueError:
        return None


def _later(modified: str | None, than: str | None) -> bool:
    """Whether the first of two HTTP dates is the later one; False where one of them is none."""
    first, second = _date(modified), _date(than)
    return first is not None and second is not None and first > second
