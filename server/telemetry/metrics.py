"""Every metric's name, labels and help, in one place.

Counters and histograms are written where things happen. Gauges are never incremented: they are read from the
server's state when ``/metrics`` is scraped, so they cannot drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from server.core.faults import COMPLETED, OUTCOMES

GENERATION_ROUTES = ("/v1/images/generations", "/v1/videos")

# A picture takes parts of a second to a minute; a film up to an hour of work, behind up to a day in line.
_LONG = (30, 60, 120, 300, 600, 1200, 1800, 3600)
_REQUEST_BUCKETS = (
    0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, *_LONG, 7200, 14400, 28800, 86400,
)  # fmt: skip
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 5, 10, *_LONG[:4])
_STAGE_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 5, 10, *_LONG)
_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
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
    video_oldest_seconds: float = 0.0
    video_work_seconds: float = 0.0
    video_unserved_jobs: int = 0
    admitted_work_seconds: float = 0.0
    engine_up: Mapping[str, int] = field(default_factory=dict)
    batch_running_seconds: Mapping[str, float] = field(default_factory=dict)
    batch_expected_seconds: Mapping[str, float] = field(default_factory=dict)
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
                "rmd_load_progress_ratio",
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
            (
                "rmd_admitted_work_seconds",
                "Expected work left on what was admitted, on one engine: what to scale by.",
                now.admitted_work_seconds,
            ),
            (
                "rmd_video_work_seconds",
                "Expected work on the films in line, for all servers that share their database.",
                now.video_work_seconds,
            ),
            (
                "rmd_video_oldest_seconds",
                "Age of the oldest film in line, 0 where none waits; of all servers that share their database.",
                now.video_oldest_seconds,
            ),
            (
                "rmd_video_unserved_jobs",
                "Unfinished films of models that this server does not serve.",
                now.video_unserved_jobs,
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
        yield _family(
            "rmd_batch_running_seconds",
            "How long an engine's present batch has run; 0 where none runs.",
            ["engine"],
            now.batch_running_seconds,
        )
        yield _family(
            "rmd_batch_expected_seconds",
            "What that batch should take; 0 where none runs.",
            ["engine"],
            now.batch_expected_seconds,
        )
        yield _family("rmd_engine_up", "1 where an engine process takes work.", ["engine"], now.engine_up)
        yield _family(
            "rmd_station_compiled", "1 where a station runs through its engines.", ["station"], now.station_compiled
        )
        speedup = GaugeMetricFamily(
            "rmd_speedup_ratio",
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
            ["model", "schedule"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.queue_seconds = Histogram(
            "rmd_queue_seconds",
            "Seconds a picture spent waiting in all queues together.",
            ["model", "schedule"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.first_partial_seconds = Histogram(
            "rmd_first_partial_seconds",
            "Seconds from admission to a stream's first partial picture.",
            ["model", "schedule"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.loop_lag_seconds = Histogram(
            "rmd_event_loop_lag_seconds",
            "How much later than asked the event loop woke a task.",
            buckets=_LAG_BUCKETS,
            registry=self.registry,
        )
        self.pictures = Counter(
            "rmd_pictures", "Pictures finished, by model and schedule.", ["model", "schedule"], registry=self.registry
        )
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
            ["model", "schedule", "stage"],
            buckets=_STAGE_BUCKETS,
            registry=self.registry,
        )
        self.decode_seconds = Histogram(
            "rmd_decode_seconds",
            "Seconds of work one picture met in decoding.",
            ["model"],
            buckets=_STAGE_BUCKETS,
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
            "rmd_device_busy_seconds", "Seconds that an engine spent in batches.", ["engine"], registry=self.registry
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

    def video_ended(self, model: str, schedule: str, outcome: str, seconds: float) -> None:
        """Count a video job that ended ``seconds`` after it was sent."""
        self.videos.labels(outcome).inc()
        if outcome == COMPLETED:
            self.request_seconds.labels(model, schedule).observe(seconds)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the exposition in a format of the header ``Accept``, and its media type.

        Only OpenMetrics has exemplars: the traces of requests, where they are traced.
        """
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type


def _family(name: str, text: str, labels: list[str], values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for label, value in values.items():
        family.add_metric([label], float(value))
    return family
