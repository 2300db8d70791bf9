"""The error table on the wire: ``{"error": {"message", "type", "param", "code"}}``, whatever failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse

from server.core.faults import COMPLETED, Fault, RequestError

_STEPS = "the schedule fixes the steps: /v1/models lists the schedules"
_TOP_LEVEL = "send what is in it at the top level of the body"
_GUIDANCE = "guidance is called guidance_scale, and guided schedules alone take it"
_SIZE = 'say size as "WIDTHxHEIGHT": /v1/models lists the sizes'
_TEXT_ALONE = "this server draws from text alone"
_WAYS_OUT = {
    **dict.fromkeys(("steps", "num_inference_steps", "num_steps"), _STEPS),
    **dict.fromkeys(("extra_body", "nvext"), _TOP_LEVEL),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance"), _GUIDANCE),
    **dict.fromkeys(("width", "height", "aspect_ratio", "resolution"), _SIZE),
    **dict.fromkeys(("image", "images", "mask", "input_image", "input_fidelity", "strength"), _TEXT_ALONE),
    "num_images": "the number of pictures is called n",
    "num_images_per_prompt": "the number of pictures is called n",
    "rng_seed": "it is called seed",
}
"""What other servers' clients send, and what it is called here."""


def error_body(error: RequestError) -> dict[str, Any]:
    """Return the JSON body."""
    kind = error.fault.value
    return {"error": {"message": error.message, "type": kind.type, "param": error.param, "code": error.code}}


def error_response(error: RequestError) -> JSONResponse:
    """Return the HTTP reply with its retry headers."""
    headers = dict(error.headers)
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if not error.fault.value.retry:
        headers["x-should-retry"] = "false"
    return JSONResponse(error_body(error), status_code=error.fault.value.status, headers=headers)


def validation_error(errors: Sequence[Any]) -> RequestError:
    """Return the 400 for the first of pydantic's errors, naming the field. The input itself is not echoed."""
    first: dict[str, Any] = errors[0] if errors else {"type": "unknown", "loc": (), "msg": "the request is not valid"}
    kind, where = first["type"], [part for part in first["loc"][1:] if isinstance(part, str)]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "syntax error")
        return RequestError(Fault.BAD_FIELD, f"The body is not valid JSON: {reason}.", code="invalid_json")
    if not where:
        return RequestError(
            Fault.BAD_FIELD,
            "The body must be a JSON object, sent with 'Content-Type: application/json'.",
            code="invalid_body",
        )
    name = where[0][:64]
    if kind == "extra_forbidden":
        text = f"Unknown field '{name}'; {_WAYS_OUT.get(name, '/docs lists the known ones')}."
        return RequestError(Fault.BAD_FIELD, text, param=name, code="unknown_parameter")
    if kind == "missing":
        return RequestError(
            Fault.BAD_FIELD, f"The field '{name}' is required.", param=name, code="missing_required_parameter"
        )
    hint = " Leave it out for a picture of its own each time." if name == "seed" and first.get("input") == -1 else ""
    return RequestError(Fault.BAD_FIELD, f"Invalid '{name}': {first['msg']}.{hint}", param=name)


def fault_for_status(status: int) -> Fault:
    """Return the table's row for a bare HTTP status raised by the framework."""
    by_status = {
        400: Fault.BAD_FIELD,
        401: Fault.BAD_KEY,
        403: Fault.FOREIGN_PAGE,
        404: Fault.NOT_FOUND,
        405: Fault.WRONG_METHOD,
        408: Fault.SLOW_BODY,
        409: Fault.CONFLICT,
        412: Fault.NOT_AS_ASKED,
        413: Fault.TOO_LARGE,
        416: Fault.BAD_RANGE,
        429: Fault.QUEUE_FULL,
        499: Fault.CLIENT_GONE,
        503: Fault.NOT_READY,
        504: Fault.DEADLINE,
    }
    return by_status.get(status, Fault.BAD_FIELD if 400 <= status < 500 else Fault.INTERNAL)


def outcome_of_status(status: int) -> str:
    """Return the metric label of a reply that was sent with this status."""
    return COMPLETED if status < 400 else fault_for_status(status).value.outcome
