"""Every way a request can end badly, in one table: what the client is told, whether to try again, how it is counted.

The numbers and names are those of OpenAI's API; how they get on the wire is `server.http.errors`' affair.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum

COMPLETED = "completed"

_LACKS = {
    errno.EMFILE: "file descriptors",
    errno.ENFILE: "file descriptors",
    errno.ENOSPC: "disk space",
    errno.EDQUOT: "disk space",
    errno.ENOMEM: "memory",
    errno.EAGAIN: "memory",  # or processes: a thread could not be begun
}


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
    NOT_AS_ASKED = FaultKind(412, "invalid_request_error", "precondition_failed", "bad_request", False)
    TOO_LARGE = FaultKind(413, "invalid_request_error", "too_large", "too_large", False)
    BAD_RANGE = FaultKind(416, "invalid_request_error", "invalid_range", "bad_request", False)
    QUEUE_FULL = FaultKind(429, "rate_limit_error", "queue_full", "queue_full", True)
    CLIENT_GONE = FaultKind(499, "client_error", "client_gone", "client_gone", False)
    ENGINE_FAILED = FaultKind(500, "server_error", "engine_failed", "engine_failed", False)
    INTERNAL = FaultKind(500, "server_error", "internal_error", "internal_error", True)
    NOT_READY = FaultKind(503, "server_error", "not_ready", "not_ready", True)
    LACKING = FaultKind(503, "server_error", "machine_lacks", "not_ready", True)
    DRAINING = FaultKind(503, "server_error", "draining", "draining", True)
    DEADLINE = FaultKind(504, "server_error", "deadline_exceeded", "deadline", False)


OUTCOMES: tuple[str, ...] = (COMPLETED, *dict.fromkeys(fault.value.outcome for fault in Fault))


class RequestError(Exception):
    """A failure that is told to the client.

    Args:
        fault: the row of the error table.
        message: one sentence that names the field and the way out.
        param: the request field at fault, if one is.
        code: overrides the table's machine-readable code.
        retry_after: whole seconds after which another try has a chance.
        headers: further headers of an HTTP reply.
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


def deadline_error() -> RequestError:
    """Return the 504 that a late request gets."""
    return RequestError(
        Fault.DEADLINE, "The deadline passed before the picture was finished; ask for less or try later."
    )


def machine_lacks(error: BaseException) -> str | None:
    """Return what the machine has too little of just now (descriptors, disk, memory); None where it is not that."""
    if isinstance(error, MemoryError):
        return "memory"
    return _LACKS.get(getattr(error, "errno", None) or 0)


def _sendable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
