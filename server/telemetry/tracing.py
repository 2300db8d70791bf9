"""OpenTelemetry traces of requests, their pictures and the batches these shared. Imported only where they are on.

Spans of work are written once it is over, by the times that engines tell: nothing is open while a device works, and
a request that is not sampled costs nothing beyond its first look. Everything but ``RMD_TRACING`` is said by the
standard ``OTEL_*`` variables.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, Tracer, format_trace_id, set_span_in_context

from server.core.faults import COMPLETED
from server.core.messages import Began, Ended
from server.core.stations import StationKey

_SHOWN_WAIT_SECONDS = 0.001
_SECOND = 1_000_000_000


def wall_nanoseconds(monotonic: float) -> int:
    """Return a moment of this host's monotonic clock (seconds) as nanoseconds since 1970."""
    return time.time_ns() + int((monotonic - time.monotonic()) * _SECOND)


class Tracing:
    """The tracer, and where its spans go: an OTLP receiver, over HTTP.

    Args:
        version: of this server, told with every span.
    """

    def __init__(self, version: str) -> None:
        own = Resource.create({"service.name": "rmd", "service.version": version})
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()))
        self._provider.sampler = _Together(self._provider.sampler)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self.tracer = self._provider.get_tracer("rmd", version)

    def serve(self, headers: Mapping[str, str], method: str, route: str, request_id: str) -> ServerSpan:
        """Begin the span of an HTTP request, in its caller's trace where it named one."""
        attributes = {"http.request.method": method, "http.route": route, "rmd.request_id": request_id}
        context = propagate.extract(headers)
        return ServerSpan(
            self.tracer.start_span(f"{method} {route}", context, SpanKind.SERVER, attributes), time.time_ns()
        )

    def follow(
        self,
        parent: ServerSpan | None,
        carrier: Mapping[str, str],
        arrived: float,
        film: bool,
        seeds: Sequence[int],
        about: dict[str, Any],
    ) -> RequestTrace | None:
        """Begin the spans of an admitted request's pictures; None where it is not sampled.

        Args:
            parent: the span of its HTTP request, where that is still being answered.
            carrier: otherwise, what :meth:`ServerSpan.carrier` gave.
            arrived: monotonic seconds of its admission.
            film: it is a film's, not pictures'.
            seeds: one a picture.
            about: attributes of all its spans, ``rmd.request_id`` among them.
        """
        context = propagate.extract(carrier) if parent is None else set_span_in_context(parent.span)
        if parent is not None and not parent.span.is_recording():
            return None
        begun = wall_nanoseconds(arrived)
        if parent is not None:
            admission = self.tracer.start_span("admission", context, attributes=about, start_time=parent.begun)
            admission.end(begun)
        pictures = []
        for index, seed in enumerate(seeds):
            attributes = {**about, "rmd.picture": index, "rmd.seed": seed}
            name = "film" if film else f"picture {index}"
            span = self.tracer.start_span(name, context, attributes=attributes, start_time=begun)
            if not span.is_recording():
                return None
            pictures.append(_Picture(span, begun, attributes))
        return RequestTrace(self.tracer, context, pictures, about)

    def close(self) -> None:
        """Send what has not been sent; a receiver that is away is waited for as OTEL_EXPORTER_OTLP_TIMEOUT says."""
        self._provider.shutdown()


class ServerSpan:
    """The span of one HTTP request. ``begun``: nanoseconds since 1970."""

    def __init__(self, span: Span, begun: int) -> None:
        self.span, self.begun = span, begun
        self.trace_id = format_trace_id(span.get_span_context().trace_id)

    def carrier(self) -> dict[str, str]:
        """Return the headers by which others go on with this trace: ``traceparent``, as OTEL_PROPAGATORS says."""
        carrier: dict[str, str] = {}
        propagate.inject(carrier, set_span_in_context(self.span))
        return carrier

    def end(self, status: int, outcome: str) -> None:
        """It is answered."""
        self.span.set_attributes({"http.response.status_code": status, "rmd.outcome": outcome})
        if status >= 500:
            self.span.set_status(Status(StatusCode.ERROR, outcome))
        self.span.end()


@dataclass
class _Picture:
    """``since``: when it came to where it waits now. ``size``: of its last denoising step."""

    span: Span
    since: int
    attributes: dict[str, Any]
    size: str = ""
    open: bool = True


class RequestTrace:
    """The spans of one sampled request's pictures, and of the reply. Guarded by the ledger's lock."""

    def __init__(self, tracer: Tracer, context: Context, pictures: list[_Picture], about: dict[str, Any]) -> None:
        self.tracer = tracer
        self._context, self._pictures, self._about = context, pictures, about
        self._reply: Span | None = None

    def ran(self, index: int | None, name: str, start: int, attributes: Mapping[str, Any]) -> Span:
        """Begin the span of a picture's part in a batch; of a partial picture's where ``index`` is None."""
        if index is None:
            return self.tracer.start_span(
                f"{name} partial", self._context, attributes={**self._about, **attributes}, start_time=start
            )
        picture = self._pictures[index]
        context = set_span_in_context(picture.span)
        if start - picture.since > _SHOWN_WAIT_SECONDS * _SECOND:
            waits = {**picture.attributes, "rmd.station": attributes["rmd.station"]}
            self.tracer.start_span("queue", context, attributes=waits, start_time=picture.since).end(start)
        return self.tracer.start_span(name, context, attributes={**picture.attributes, **attributes}, start_time=start)

    def moved(self, index: int | None, key: StationKey, start: int, end: int) -> dict[str, Any] | None:
        """Note that a picture's batch is over; return the hand-over's facts where it began a new size."""
        if index is None:
            return None
        picture = self._pictures[index]
        picture.since = end
        size, picture.size = picture.size, str(key.size) if key.kind == "denoise" else picture.size
        return {"from": size, "to": picture.size} if size and size != picture.size else None

    def packaged(self, index: int, seconds: float) -> None:
        """A picture was compressed, just now and in so many seconds, and is complete."""
        now = time.time_ns()
        span = self.ran(index, "package", now - int(seconds * _SECOND), {"rmd.station": "package"})
        span.end(now)
        self._end(self._pictures[index], COMPLETED, now)
        if not any(picture.open for picture in self._pictures):
            self._reply = self.tracer.start_span("reply", self._context, attributes=self._about, start_time=now)

    def engine_lost(self, indices: Iterable[int]) -> None:
        """The engine that had these pictures has ended; they begin anew, or as they were handed over."""
        for picture in (self._pictures[index] for index in indices):
            if picture.open:
                picture.span.add_event("engine lost")
                picture.since, picture.size = time.time_ns(), ""

    def ended(self, outcome: str) -> None:
        """It has ended early."""
        for picture in self._pictures:
            if picture.open:
                self._end(picture, outcome, time.time_ns())

    def replied(self) -> None:
        """Its reply has been sent."""
        if self._reply is not None:
            self._reply.end()

    def _end(self, picture: _Picture, outcome: str, now: int) -> None:
        picture.open = False
        picture.span.set_attribute("rmd.outcome", outcome)
        if outcome != COMPLETED:
            picture.span.set_status(Status(StatusCode.ERROR, outcome))
        picture.span.end(now)


Member = tuple[RequestTrace, int | None, int]
"""Of a batch: a request's trace, which of its pictures (None: a partial one), and the denoising step it took."""


def trace_batch(began: Began, ended: Ended, at: float, engine: int, members: Sequence[Member]) -> None:
    """Write a batch's span, and those of the sampled pictures in it, linked both ways.

    The batch begins a trace of its own: it belongs to none of its requests more than to another.

    Args:
        at: when it ended, seconds since 1970.
        engine: which one ran it.
        members: at least one.
    """
    end = int(at * _SECOND)
    start = end - int(ended.seconds * _SECOND)
    key, tracer = began.key, members[0][0].tracer
    facts: dict[str, Any] = {
        "rmd.station": key.label,
        "rmd.engine": engine,
        "rmd.batch": began.batch,
        "rmd.batch.rows": ended.rows,
        "rmd.batch.company": ended.company,
        "rmd.batch.mates": ended.company - 1,
    }
    if ended.failed:
        facts["rmd.batch.failed"] = ended.failed
    spans = []
    for trace, index, step in members:
        name = f"step {step + 1} at {key.size}" if key.kind == "denoise" else key.kind
        span = trace.ran(index, name, start, facts)
        handed = trace.moved(index, key, start, end)
        if handed is not None:  # upsampling and new noise are the first part of the step they are for
            span.add_event("hand-over", handed, start)
        spans.append(span)
    requests = list(dict.fromkeys([*(request for request, _ in began.members), *began.previews]))
    batch = tracer.start_span(
        f"batch at {key.label}",
        Context(),
        attributes={**facts, "rmd.request_ids": requests},
        links=[Link(span.get_span_context(), {"rmd.batch.member": True}) for span in spans],
        start_time=start,
    )
    for span in (*spans, batch):
        if ended.failed:
            span.set_status(Status(StatusCode.ERROR, ended.failed))
        if span is not batch:
            span.add_link(batch.get_span_context())
        span.end(end)


class _Together(Sampler):
    """Keeps a span that is linked to a sampled one, such as a batch of a sampled picture; else asks another sampler."""

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        trace_state: Any = None,
    ) -> SamplingResult:
        """Decide on one span."""
        if any(link.context.trace_flags.sampled for link in links or ()):
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes, trace_state)
        return self._inner.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        """Name it."""
        return f"Together({self._inner.get_description()})"
