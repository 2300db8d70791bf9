"""The executor: one thread owns the device, and every batch of every station runs on it.

The thread first loads the model, then repeats: drop what is cancelled or late, ask the policy for the next batch,
run it, hand its entries on. Nothing else touches the device, so no lock is held while a batch runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from server.core.latency import StationKey
from server.core.policies.stagewise import StagePolicy
from server.core.request import (
    Advanced,
    Entry,
    Failed,
    FinishedPicture,
    Generation,
    Item,
    PartialPicture,
    Preview,
)
from server.core.stations import Station, Stations
from server.device.model import ServedModel
from server.device.steps import StageRunner
from server.front.media import Pixels, encode_film, encode_picture, encode_spritesheet, encode_thumbnail
from server.http.errors import ApiError, Fault
from server.telemetry.metrics import Metrics

log = logging.getLogger("rmd.server")

PACKAGE = "package"
_HOPELESS = 0.5  # of the expected work: with less time left than that, a picture cannot be ready by its deadline


@dataclass(frozen=True)
class _Done:
    """What one batch gave: its seconds, the network's rows, partial pictures now due, and pixels where it decoded."""

    seconds: float
    rows: int
    previews: Sequence[Preview]
    pictures: Sequence[Pixels]


class DeviceExecutor:
    """Owns the device thread and the queues.

    Args:
        load: builds or loads the model; runs on the device thread.
        metrics: where batches and pictures are counted.
        package_threads: threads that compress pictures beside the device.
        film_seconds: a film's time in denoising steps and decoding; waiting is not counted.
        on_ready: called on the device thread once the model is loaded.
        on_failed: called on the device thread where loading raised, or the loop itself broke.
        on_picture: called with (generation, item) for each finished picture.
    """

    def __init__(
        self,
        load: Callable[[], ServedModel],
        metrics: Metrics,
        *,
        package_threads: int = 2,
        film_seconds: float = 3600.0,
        on_ready: Callable[[ServedModel], None] = lambda model: None,
        on_failed: Callable[[BaseException], None] = lambda error: None,
        on_picture: Callable[[Generation, Item], None] = lambda generation, item: None,
    ) -> None:
        self._load = load
        self._metrics = metrics
        self._film_seconds = film_seconds
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._on_picture = on_picture
        self._stations = Stations()
        self._changed = threading.Condition()
        self._stopping = self._broken = False
        self._running: list[Entry] = []  # taken from a station, not yet handed on; the device thread's own
        self._packaging = 0
        self._model: ServedModel | None = None
        self._pool = ThreadPoolExecutor(package_threads, thread_name_prefix="rmd-package")
        self._thread = threading.Thread(target=self._main, name="rmd-device", daemon=True)

    # -- called from any thread ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the device thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once the device thread has ended."""
        return self._thread.is_alive()

    def stop(self, timeout: float = 30.0) -> None:
        """Let the batch in progress finish, fail whatever is left with 503, and end the thread."""
        with self._changed:
            self._stopping = True
            self._give_up(self._stations.remove(lambda entry: True))  # at once, whatever the batch that runs takes
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if not self.alive:  # a batch that outlasts the timeout still hands its pictures to the pool
            self._pool.shutdown(wait=True, cancel_futures=False)

    def submit(self, generation: Generation) -> None:
        """Put an admitted generation's items before the encode station."""
        with self._changed:
            if self._stopping:
                self._give_up(generation.items)
                return
            for item in generation.items:
                self._stations.join(item.station(), item)
            self._changed.notify_all()

    def cancel(self, generation: Generation, error: ApiError) -> None:
        """End a generation: what waits leaves its queue at once, what runs is dropped at the next hand-over."""
        with self._changed:
            self._settle(generation, error)

    def backlog(self, work: float) -> float:
        """Return the expected work (seconds) that goes before a newcomer's; whoever needs more than it is passed."""
        with self._changed:
            ahead = [*self._running, *(entry for station in self._stations for entry in station.entries)]
            return sum(min(entry.remaining_seconds, work) for entry in ahead if not entry.generation.failed)

    def depths(self) -> dict[str, int]:
        """Return how many entries wait at each station, by label."""
        with self._changed:
            depths = {key.label: depth for key, depth in self._stations.depths().items()}
            depths[PACKAGE] = self._packaging
        return depths

    # -- the device thread -----------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            model = self._load()
            self._model = model
            runner, policy = StageRunner(model), StagePolicy(model.latencies)
            with self._changed:
                self._stations.open(model.stations())
            self._on_ready(model)
            while (batch := self._next_batch(policy)) is not None:
                self._run(runner, model, *batch)
                self._running = []
        except BaseException as error:  # the thread must never die silently: readiness has to say so
            self._broken = True
            log.error("the device thread ended: %s", error, exc_info=self._model is not None)
            self._on_failed(error)
        finally:
            with self._changed:
                self._stopping = True
                self._give_up([*self._stations.remove(lambda entry: True), *self._running])

    def _next_batch(self, policy: StagePolicy) -> tuple[Station, list[Entry]] | None:
        """Wait for work and take the next batch; None when stopping."""
        with self._changed:
            while not self._stopping:
                self._drop_late()
                chosen = policy.choose(self._stations, time.monotonic())
                if chosen is not None:
                    station, entries = chosen
                    self._stations.take(station, entries)
                    self._running = list(entries)
                    now = time.monotonic()
                    for entry in entries:
                        if isinstance(entry, Item):
                            entry.record.queue += now - entry.joined
                            if station.key.kind == "denoise" and entry.step == 0:
                                _report(entry)
                    return station, entries
                self._changed.wait()
        return None

    def _run(
        self, runner: StageRunner, model: ServedModel, station: Station, entries: list[Entry], again: bool = False
    ) -> None:
        """Run one batch. Where it raises, every entry is tried once more, alone, and only the guilty fail.

        Raises:
            torch.AcceleratorError: the device itself is broken (a sticky CUDA error): no later batch can succeed, so
                the thread ends and /health/live asks for a restart.
        """
        try:
            done = self._work(runner, model, station.key, entries)
        except torch.AcceleratorError as error:
            if len(entries) == 1:  # of several none is known to be guilty: they get the 503 of whoever else waits
                self._fail(entries[0], error)
            raise
        except Exception as error:
            if again:
                self._fail(entries[0], error)
                return
            log.warning("a batch of %d at %s raised (%s); trying each alone", len(entries), station.key.label, error)
            if isinstance(error, torch.OutOfMemoryError):
                model.latencies.narrow(station.key, _rows(station.key, entries))
        else:
            self._account(model, station.key, entries, done)
            self._hand_on(station.key, entries, done)
            return
        # Out here no traceback keeps the failed batch's tensors: what fits alone must not fail for lack of memory.
        self._metrics.retried_batches.labels(station.key.label).inc()
        if model.backbone.device.type == "cuda":
            torch.cuda.empty_cache()
        for entry in entries:
            with self._changed:
                if entry.generation.failed:  # by a sibling of this batch, its client or its deadline
                    self._leave(entry)
                    continue
            self._run(runner, model, station, [entry], again=True)

    def _work(self, runner: StageRunner, model: ServedModel, key: StationKey, entries: Sequence[Entry]) -> _Done:
        """Do one batch's work on the device. Raises whatever the network raises, before any entry is changed."""
        started = time.perf_counter()
        items = [entry for entry in entries if isinstance(entry, Item)]
        rows = _rows(key, entries)
        previews: list[Preview] = []
        pictures: list[Pixels] = []
        if key.kind == "encode":
            rows = runner.encode(items)
        elif key.kind == "denoise":
            previews = runner.denoise(key, items)
        else:
            assert key.size is not None
            pictures = runner.decode(key.size, [entry for entry in entries if isinstance(entry, Item | Preview)])
        if model.backbone.device.type == "cuda":
            torch.cuda.synchronize(model.backbone.device)
        return _Done(time.perf_counter() - started, rows, previews, pictures)

    def _hand_on(self, key: StationKey, entries: Sequence[Entry], done: _Done) -> None:
        """Send each entry to its next station; whose generation has ended meanwhile leaves the house here."""
        with self._changed:
            for preview in done.previews:
                if not preview.generation.failed:
                    self._stations.join(StationKey("decode", size=preview.size), preview)
            for entry in entries if key.kind != "decode" else ():
                if entry.generation.failed:
                    self._leave(entry)
                elif isinstance(entry, Item):
                    if key.kind == "denoise":
                        _report(entry)
                    self._stations.join(entry.station(), entry)
                self._running.remove(entry)
            self._packaging += len(done.pictures)
        if key.kind == "decode":
            for entry, pixels in zip(entries, done.pictures, strict=True):
                entry.joined = time.monotonic()
                self._pool.submit(self._package, entry, pixels, key)
                self._running.remove(entry)

    def _account(self, model: ServedModel, key: StationKey, entries: Sequence[Entry], done: _Done) -> None:
        """Write one batch into the metrics, the latency table and its items' own records."""
        if not done.rows:
            return  # a prompt that an earlier picture of the same request had encoded, in a batch that was tried again
        label, rows, seconds = key.label, done.rows, done.seconds
        items = [entry for entry in entries if isinstance(entry, Item)]
        model.latencies.observe(key, rows, seconds)
        company = rows if key.kind == "encode" else len(entries)
        self._metrics.batch_size.labels(label).observe(company)
        self._metrics.step_seconds.labels(label).observe(seconds)
        self._metrics.device_busy_seconds.inc(seconds)
        if key.kind == "denoise" and key.size is not None:
            self._metrics.steps.labels(label).inc(len(items))
            self._metrics.tokens.labels(label).inc(rows * model.lanes[key.lane].tokens(key.size))
        for item in items:
            record = item.record
            record.batches.setdefault(label, []).append(company)
            if key.kind == "encode":
                record.encode += seconds
            elif key.kind == "decode":
                record.decode += seconds
            else:
                record.stages[label] = record.stages.get(label, 0.0) + seconds

    # -- packaging (pool threads) ----------------------------------------------------------------------------------

    def _package(self, entry: Entry, pixels: Pixels, key: StationKey) -> None:
        """Compress one picture and send it; runs beside the device."""
        with self._changed:
            self._packaging -= 1
        try:
            self._package_one(entry, pixels, key)
        except Exception as error:
            self._fail(entry, error)
        finally:
            with self._changed:
                self._leave(entry)

    def _package_one(self, entry: Entry, pixels: Pixels, key: StationKey) -> None:
        generation, spec = entry.generation, entry.generation.spec
        if generation.failed:
            return
        started = time.monotonic()
        metadata = dict(spec.metadata)
        if isinstance(entry, Item):
            entry.record.queue += started - entry.joined
            metadata["rmd:seed"] = str(entry.seed)
        thumbnail, spritesheet = b"", b""
        if spec.frames_per_second is not None:
            content = encode_film(pixels, spec.frames_per_second)
            thumbnail, spritesheet = encode_thumbnail(pixels), encode_spritesheet(pixels)
        else:
            content = encode_picture(pixels, spec.output_format, spec.output_compression, metadata)
        if isinstance(entry, Preview) and key.size is not None:
            generation.sink(PartialPicture(entry.item.index, entry.partial_index, key.size, content))
        elif isinstance(entry, Item):
            entry.record.package = time.monotonic() - started
            with self._changed:
                if generation.failed:
                    return  # it ended while its picture was being compressed
                self._count(entry)
                self._leave(entry)  # its place is free before the client hears of it
                generation.sink(FinishedPicture(entry.index, content, entry.record, thumbnail, spritesheet))

    def _count(self, item: Item) -> None:
        spec, record = item.generation.spec, item.record
        self._metrics.pictures.labels(spec.schedule).inc()
        self._metrics.queue_seconds.labels(spec.schedule).observe(record.queue)
        self._metrics.decode_seconds.observe(record.decode)
        for stage, seconds in record.stages.items():
            self._metrics.stage_seconds.labels(spec.schedule, stage).observe(seconds)
        self._on_picture(item.generation, item)

    # -- endings ---------------------------------------------------------------------------------------------------

    def _drop_late(self) -> None:
        """Fail (504) what waits and has missed its deadline, or is bound to. Called with the lock held."""
        now = time.monotonic()
        late = {
            id(entry.generation): entry.generation
            for s in self._stations
            for entry in s.entries
            if self._time_left(entry, now) <= _HOPELESS * entry.remaining_seconds
        }
        for generation in late.values():
            self._settle(generation, deadline_error())

    def _time_left(self, entry: Entry, now: float) -> float:
        """A picture's until its deadline. Of a film only work counts: films that share a device wait for each other."""
        if isinstance(entry, Item) and entry.generation.spec.frames_per_second is not None:
            return self._film_seconds - sum(entry.record.stages.values())
        return entry.generation.deadline - now

    def _fail(self, entry: Entry, error: Exception) -> None:
        """Fail one entry's generation with 500; the reason goes to the log, not to the client."""
        request = entry.generation.request_id
        log.error("request %s failed: %s: %s", request, type(error).__name__, error, exc_info=error)
        with self._changed:
            if isinstance(entry, Preview):
                return  # a partial picture is a courtesy; the picture itself goes on
            self._settle(
                entry.generation,
                ApiError(Fault.ENGINE_FAILED, "The model failed on this request; others are not affected."),
            )
            self._leave(entry)

    def _give_up(self, entries: Sequence[Entry]) -> None:
        """Fail entries that stand at no station with 503. Called with the lock held."""
        why = (
            (Fault.NOT_READY, "The server's device failed.")
            if self._broken
            else (Fault.DRAINING, "The server is stopping.")
        )
        for entry in entries:
            self._settle(entry.generation, ApiError(*why, retry_after=1))
            self._leave(entry)

    def _settle(self, generation: Generation, error: ApiError) -> None:
        """Mark a generation as failed, once, tell its client and empty the queues of it. Called with the lock held."""
        if generation.failed or generation.remaining_items == 0:
            return
        generation.failed = True
        generation.sink(Failed(error))
        waiting = self._stations.remove(lambda entry: entry.generation is generation)
        self._metrics.dropped.labels(error.fault.value.outcome).inc(generation.remaining_items)
        for entry in waiting:
            self._leave(entry)

    def _leave(self, entry: Entry) -> None:
        """Count an item out, once, and give its place back. Called with the lock held."""
        if isinstance(entry, Item) and not entry.left:
            entry.left = True
            entry.generation.remaining_items -= 1
            entry.generation.permit.leave(finished=not entry.generation.failed)


def _report(item: Item) -> None:
    """Say how far a film is. Pictures are too quick for that."""
    if item.generation.spec.frames_per_second is not None:
        item.generation.sink(Advanced(item.share))


def _rows(key: StationKey, entries: Sequence[Entry]) -> int:
    """Return the rows of a batch: a guided picture takes two of a denoiser's."""
    return sum(entry.rows for entry in entries) if key.kind == "denoise" else len(entries)


def deadline_error() -> ApiError:
    """Return the 504 that a late generation gets."""
    return ApiError(Fault.DEADLINE, "The deadline passed before the picture was finished; ask for less or try later.")
