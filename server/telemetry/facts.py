"""What is known of the HTTP request that is being answered, for its log line and its trace. Never what it says."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.telemetry.tracing import RequestTrace, ServerSpan


@dataclass
class RequestFacts:
    """One request's.

    Attributes:
        span: of the request, where it is traced; its trace may be another service's, who sent ``traceparent``.
        trace: of its pictures, once they are admitted.
        model, schedule: once they are known.
        seconds: of its pictures, the longest: "queue" and "compute"; and "first_partial".
    """

    request_id: str
    span: ServerSpan | None = None
    trace: RequestTrace | None = None
    model: str = ""
    schedule: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def took(self, what: str, seconds: float) -> None:
        """Note how long something took; of several pictures' the longest stays."""
        self.seconds[what] = max(self.seconds.get(what, 0.0), round(seconds, 6))

    @property
    def exemplar(self) -> dict[str, str] | None:
        """By which a metric leads to a trace; None where that is not kept."""
        return None if self.span is None or not self.span.span.is_recording() else {"trace_id": self.span.trace_id}

    @property
    def ids(self) -> dict[str, str]:
        """By which its lines, spans and exemplars find each other."""
        return {"request_id": self.request_id, **({} if self.span is None else {"trace_id": self.span.trace_id})}


CURRENT: ContextVar[RequestFacts | None] = ContextVar("rmd_request", default=None)


def current_ids() -> dict[str, Any]:
    """Return the ids of the request that is being answered here; none elsewhere."""
    facts = CURRENT.get()
    return {} if facts is None else facts.ids
