"""Every way a request can end badly: one enum gives the status, OpenAI's error type and the metric's label.

The body on the wire is always ``{"error": {"message", "type", "param", "code"}}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from starlette.responses import JSONResponse

COMPLETED = "completed"


@dataclass(frozen=True)
class FaultKind:
    """How one kind of failure is told to the client and counted.

    ``retry`` is False where sending the same request again cannot help; the reply then carries
    ``x-should-retry: false``, which the official client obeys.
    """

    status: int
    type: str
    code: str
    outcome: str
    retry: bool


class Fault(Enum):
    """The error table of the HTTP surface."""

    BAD_FIELD = FaultKind(400, "invalid_request_error", "invalid_value", "bad_request", False)
    BAD_KEY = FaultKind(401, "authentication_error", "invalid_api_key", "unauthorized", False)
    FOREIGN_PAGE = FaultKind(403, "permission_error", "cross_site", "unauthorized", False)
    NOT_FOUND = FaultKind(404, "invalid_request_error", "not_found", "not_found", False)
    WRONG_METHOD = FaultKind(405, "invalid_request_error", "method_not_allowed", "bad_request", False)
    SLOW_BODY = FaultKind(408, "invalid_request_error", "body_timeout", "bad_request", True)
    CONFLICT = FaultKind(409, "invalid_request_error", "conflict", "conflict", False)
    TOO_LARGE = FaultKind(413, "invalid_request_error", "too_large", "too_large", False)
    QUEUE_FULL = FaultKind(429, "rate_limit_error", "queue_full", "queue_full", True)
    CLIENT_GONE = FaultKind(499, "client_error", "client_gone", "client_gone", False)
    ENGINE_FAILED = FaultKind(500, "server_error", "engine_failed", "engine_failed", False)
    INTERNAL = FaultKind(500, "server_error", "internal_error", "internal_error", True)
    NOT_READY = FaultKind(503, "server_error", "not_ready", "not_ready", True)
    DRAINING = FaultKind(503, "server_error", "draining", "draining", True)
    DEADLINE = FaultKind(504, "server_error", "deadline_exceeded", "deadline", False)


OUTCOMES: tuple[str, ...] = (COMPLETED, *dict.fromkeys(fault.value.outcome for fault in Fault))


class ApiError(Exception):
    """A failure that is told to the client in OpenAI's error shape.

    Args:
        fault: the row of the error table.
        message: one sentence that names the field and the way out.
        param: the request field at fault, if one is.
        code: overrides the table's machine-readable code.
        retry_after: whole seconds for the ``Retry-After`` header.
    """

    def __init__(
        self,
        fault: Fault,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.fault = fault
        # What is quoted may hold a lone surrogate, such as the name of an unknown field.
        self.message = _sendable(message)
        self.param = None if param is None else _sendable(param)
        self.code = code or fault.value.code
        self.retry_after = retry_after
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        return {
            "error": {"message": self.message, "type": self.fault.value.type, "param": self.param, "code": self.code}
        }

    def response(self) -> JSONResponse:
        """Return the HTTP reply with its retry headers."""
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if not self.fault.value.retry:
            headers["x-should-retry"] = "false"
        return JSONResponse(self.body(), status_code=self.fault.value.status, headers=headers)


def validation_error(errors: Sequence[Any]) -> ApiError:
    """Return the 400 for the first of pydantic's errors, naming the field. The input itself is not echoed."""
    first: dict[str, Any] = errors[0] if errors else {"type": "unknown", "loc": (), "msg": "the request is not valid"}
    kind, where = first["type"], [part for part in first["loc"][1:] if isinstance(part, str)]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "syntax error")
        return ApiError(Fault.BAD_FIELD, f"The body is not valid JSON: {reason}.", code="invalid_json")
    if not where:
        return ApiError(
            Fault.BAD_FIELD,
            "The body must be a JSON object, sent with 'Content-Type: application/json'.",
            code="invalid_body",
        )
    name = where[0][:64]
    if kind == "extra_forbidden":
        text = f"Unknown field '{name}'; /docs lists the known ones."
        return ApiError(Fault.BAD_FIELD, text, param=name, code="unknown_parameter")
    if kind == "missing":
        return ApiError(
            Fault.BAD_FIELD, f"The field '{name}' is required.", param=name, code="missing_required_parameter"
        )
    return ApiError(Fault.BAD_FIELD, f"Invalid '{name}': {first['msg']}.", param=name)


def _sendable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


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
        413: Fault.TOO_LARGE,
        429: Fault.QUEUE_FULL,
        499: Fault.CLIENT_GONE,
        503: Fault.NOT_READY,
        504: Fault.DEADLINE,
    }
    return by_status.get(status, Fault.BAD_FIELD if 400 <= status < 500 else Fault.INTERNAL)


def outcome_of_status(status: int) -> str:
    """Return the metric label of a reply that was sent with this status."""
    return COMPLETED if status < 400 else fault_for_status(status).value.outcome
