"""Every metric's name, labels and help, in one place.

Counters and histograms are written where things happen. Gauges are never incremented: they are read from the
server's state when ``/metrics`` is scraped, so they cannot drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.core.faults import COMPLETED, OUTCOMES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

GENERATION_ROUTES = ("/v1/images/generations", "/v1/videos")

_REQUEST_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120, 300)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 5, 10)
_BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


@dataclass(frozen=True)
class Snapshot:
    """The server's state at one scrape."""

    ready: bool
    draining: bool
    load_progress: float
    in_flight_requests: int
    in_flight_items: int
    queue_capacity_items: int
    queue_depth: Mapping[str, int] = field(default_factory=dict)
    batch_width: Mapping[str, int] = field(default_factory=dict)
    engine_memory_bytes: Mapping[str, int] = field(default_factory=dict)
    teacher_seconds: Mapping[str, float] = field(default_factory=dict)
    speedup: Mapping[tuple[str, str], float] = field(default_factory=dict)
    stored_file_bytes: int = 0
    video_jobs: Mapping[str, int] = field(default_factory=dict)
    engine_up: Mapping[str, int] = field(default_factory=dict)
    station_compiled: Mapping[str, int] = field(default_factory=dict)
    teacher_age_seconds: Mapping[str, float] = field(default_factory=dict)
    teacher_spread: Mapping[str, float] = field(default_factory=dict)


class _StateCollector(Collector):
    """Turns a :class:`Snapshot` into gauges at scrape time."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        now = self._snapshot()
        plain: tuple[tuple[str, str, float], ...] = (
            ("rmd_ready", "1 where every engine is loaded and warmed and requests are accepted.", now.ready),
            ("rmd_draining", "1 while accepted requests are finished before the server stops.", now.draining),
            (
                "rmd_load_progress",
                "Share of the start-up's present part (build, load, warm-up) that is done.",
                now.load_progress,
            ),
            ("rmd_in_flight_requests", "Requests admitted and not yet answered.", now.in_flight_requests),
            ("rmd_in_flight_items", "Pictures admitted and not yet done.", now.in_flight_items),
            ("rmd_queue_capacity_items", "Pictures that can be admitted at once.", now.queue_capacity_items),
            (
                "rmd_stored_file_bytes",
                "Bytes kept for response_format=url, as this server last saw them.",
                now.stored_file_bytes,
            ),
        )
        for name, text, value in plain:
            yield GaugeMetricFamily(name, text, value=float(value))
        yield _family("rmd_queue_depth", "Entries waiting at a station.", ["station"], now.queue_depth)
        yield _family("rmd_video_jobs", "Video jobs kept, by status.", ["status"], now.video_jobs)
        yield _family("rmd_batch_width", "Widest batch (rows) worth running.", ["station"], now.batch_width)
        yield _family(
            "rmd_engine_memory_bytes", "Memory held by a component's weights.", ["component"], now.engine_memory_bytes
        )
        yield _family(
            "rmd_teacher_seconds",
            "The teacher's own latency for one picture, timed on this machine: guided step x steps + "
            "encode + decode. kind: eager or compiled.",
            ["kind"],
            now.teacher_seconds,
        )
        yield _family(
            "rmd_teacher_age_seconds",
            "Seconds since the teacher's guided step was last timed.",
            ["kind"],
            now.teacher_age_seconds,
        )
        yield _family(
            "rmd_teacher_spread_ratio",
            "Third over first quartile of the teacher's latest timings; above 1.5 no speed-up is told.",
            ["kind"],
            now.teacher_spread,
        )
        yield _family("rmd_engine_up", "1 where an engine process takes work.", ["engine"], now.engine_up)
        yield _family(
            "rmd_station_compiled", "1 where a station runs through its engines.", ["station"], now.station_compiled
        )
        speedup = GaugeMetricFamily(
            "rmd_speedup",
            "Teacher's seconds over the mean compute seconds (queues left out) of the last pictures.",
            labels=["schedule", "kind"],
        )
        for (schedule, kind), value in now.speedup.items():
            speedup.add_metric([schedule, kind], value)
        yield speedup


class Metrics:
    """The registry and its counters and histograms.

    Args:
        snapshot: returns the state that the gauges show; called at each scrape, from the scraping thread.
    """

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rmd_requests", "HTTP requests by route and how they ended.", ["route", "outcome"], registry=self.registry
        )
        self.key_requests = Counter(
            "rmd_key_requests",
            "Calls to /v1 by the name of their API key and how they ended.",
            ["key", "outcome"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "rmd_request_seconds",
            "Seconds from admission (a film's from its job's creation) to the finished reply, completed ones only.",
            ["schedule"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.queue_seconds = Histogram(
            "rmd_queue_seconds",
            "Seconds a picture spent waiting in all queues together.",
            ["schedule"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.pictures = Counter("rmd_pictures", "Pictures finished, by schedule.", ["schedule"], registry=self.registry)
        self.dropped = Counter(
            "rmd_dropped_items", "Pictures given up before they were finished.", ["outcome"], registry=self.registry
        )
        self.videos = Counter("rmd_videos", "Video jobs by how they ended.", ["outcome"], registry=self.registry)
        self.batch_size = Histogram(
            "rmd_batch_size",
            "Pictures (encode: texts) served together in one batch, by station.",
            ["station"],
            buckets=_BATCH_BUCKETS,
            registry=self.registry,
        )
        self.step_seconds = Histogram(
            "rmd_step_seconds",
            "Seconds of one batch at a station: one denoising step, one encoding or one decoding.",
            ["station"],
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "rmd_stage_seconds",
            "Seconds of work one picture met in all steps of a stage.",
            ["schedule", "stage"],
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        )
        self.decode_seconds = Histogram(
            "rmd_decode_seconds",
            "Seconds of work one picture met in decoding.",
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        )
        self.steps = Counter(
            "rmd_steps", "Denoising steps done, counted a picture.", ["station"], registry=self.registry
        )
        self.tokens = Counter(
            "rmd_tokens",
            "Picture tokens through the denoiser, rows of guidance included.",
            ["station"],
            registry=self.registry,
        )
        self.retried_batches = Counter(
            "rmd_retried_batches",
            "Batches that raised and were retried entry by entry.",
            ["station"],
            registry=self.registry,
        )
        self.device_busy_seconds = Counter(
            "rmd_device_busy_seconds", "Seconds that engines spent in batches.", registry=self.registry
        )
        self.engine_restarts = Counter(
            "rmd_engine_restarts", "Times an engine process was started again.", ["engine"], registry=self.registry
        )
        self.registry.register(_StateCollector(snapshot))
        ProcessCollector(registry=self.registry)
        # From the start: a counter that appears with its first failure has no increase that an alert could see.
        for outcome in OUTCOMES:
            self.videos.labels(outcome)
            self.dropped.labels(outcome)
            for route in GENERATION_ROUTES:
                self.requests.labels(route, outcome)

    def video_ended(self, schedule: str, outcome: str, seconds: float) -> None:
        """Count a video job that ended ``seconds`` after it was sent."""
        self.videos.labels(outcome).inc()
        if outcome == COMPLETED:
            self.request_seconds.labels(schedule).observe(seconds)

    def render(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self.registry)


def _family(name: str, text: str, labels: list[str], values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for label, value in values.items():
        family.add_metric([label], float(value))
    return family
