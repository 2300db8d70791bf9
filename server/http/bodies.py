"""Replies that hold pictures, as bytes. Encoding megabytes of text as JSON would hold the event loop for as long as a
picture takes to draw; base64 needs no escapes, so it is put in place as it is."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_FIELD = "b64_json"


def json_bytes(payload: Mapping[str, Any]) -> bytes:
    """Return a payload as JSON; its ``b64_json``, or those of its ``data``, must be base64."""
    mark = secrets.token_hex(8)
    texts: list[bytes] = []

    def light(entry: Mapping[str, Any]) -> dict[str, Any]:
        text = entry.get(_FIELD)
        if not isinstance(text, str):
            return dict(entry)
        texts.append(text.encode("ascii"))
        return {**entry, _FIELD: mark}

    plain = light(payload)
    if isinstance(payload.get("data"), list):
        plain["data"] = [light(entry) for entry in payload["data"]]
    parts = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode().split(mark.encode())
    # The order of the marks is that of the texts: a payload has either its own or its data's.
    return b"".join(piece for pair in zip(parts, [*texts, b""], strict=True) for piece in pair)


class PicturesResponse(Response):
    """A JSON reply made by :func:`json_bytes`."""

    media_type = "application/json"

    def __init__(self, payload: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(json_bytes(payload), headers=dict(headers or {}))
