"""An engine: owns one device, runs the scheduler's loop on it, and hears of the world through its door only.

One thread does everything, so no lock is held while a batch runs and nothing competes with it for Python: commands that
come meanwhile wait in the socket. Only where queues are long are batches left to threads, see `server.device.tracks`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch

from server.core.loop import Batch, Loop
from server.core.messages import (
    Adopt,
    Baselines,
    Busy,
    Cancel,
    Changed,
    Command,
    Encoded,
    Loading,
    Lost,
    Ping,
    Pixels,
    Pong,
    Ready,
    Stop,
    Submit,
    Unable,
    UsePolicy,
)
from server.core.policies import Hold, make_policy
from server.core.policies.stagewise import StagewisePolicy
from server.core.stages import stations_in
from server.core.stations import STUDENT
from server.core.tickets import Picture, Preview
from server.core.tracks import ENTER_TRACKS, LEAVE_TRACKS, TrackCosts
from server.device.door import EngineDoor
from server.device.measuring import COMPONENTS, compiled_buckets, measure_station
from server.device.model import DeviceModel, Loaded
from server.device.probe import Breaker, DeviceBroken
from server.device.steps import Done, StageRunner, dump_latents, load_latents
from server.device.tracks import Tracks

log = logging.getLogger("rmd.server")

Report = Callable[[int, int, str], None]
ModelLoader = Callable[[Report], Loaded]

_IDLE_SECONDS = 1.0
_LONGEST_LOAD_SECONDS = 600.0  # of one engine, its check included
_QUIET_SECONDS = 3.0  # without work before the teacher is timed again


class Engine:
    """Loads its models, then serves the door until told to stop.

    Args:
        door: to the front, or to several.
        load: builds the models on the device thread; given a function to report (done, total, what) to.
        policy: see :func:`server.core.policies.make_policy`.
        film_seconds: a film's time on the device.
        prompt_bytes: encoded texts that are kept.
        settle: called when what was loaded stands, and again when engines have taken its place.
        tracks: batches at a time on a CPU, where engines take it and queues are long.
    """

    def __init__(
        self,
        door: EngineDoor,
        load: ModelLoader,
        policy: str = "stagewise",
        film_seconds: float = 3600.0,
        prompt_bytes: int = 64_000_000,
        settle: Callable[[], None] = lambda: None,
        tracks: int = 1,
    ) -> None:
        self._door, self._load, self._settle, self._most_tracks = door, load, settle, tracks
        self._tracks: Tracks | None = None
        self._policy, self._film_seconds, self._prompt_bytes = policy, film_seconds, prompt_bytes
        self._stopping = self._adopting = False
        self._batch_over: float | None = None  # when the last batch was, where the next follows upon it

    def run(self) -> None:
        """Serve until stopped. Whatever ends it is told through the door first.

        Raises:
            ParentGone: the front has ended.
        """
        try:
            loaded = self._load(lambda done, total, text: self._door.send(Loading(done, total, text)))
        except (ValueError, OSError, RuntimeError) as error:
            usage = not isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError)
            self._door.send(Unable(f"{type(error).__name__}: {error}", usage))
            return
        device = loaded.models[0].backbone.device
        self._load_latents = partial(load_latents, device=device)
        self._costs, self._models = loaded.costs, {model.card.place: model for model in loaded.models}
        self._runners = {
            place: StageRunner(model, self._prompt_bytes // len(self._models)) for place, model in self._models.items()
        }
        self._breakers = {place: Breaker(model) for place, model in self._models.items()}
        cards = tuple(model.card for model in loaded.models)
        self._seen = TrackCosts(self._costs)
        self._loop = Loop(
            cards,
            self._costs,
            make_policy(self._policy, self._seen),
            self._door.send,
            self._film_seconds,
            recall=lambda request: self._runners[request.work.model].recall(request),
            stages=loaded.stages,
            dump=dump_latents,
            seen=self._seen,
        )
        self._settle()
        table = self._costs.table()
        costs = tuple((key, rows, each) for key, widths in table.items() for rows, each in widths.items())
        self._door.send(Ready(cards, costs, loaded.missing, time.time() - time.monotonic(), loaded.stages))
        try:
            self._serve()
        except DeviceBroken as error:
            log.error("the device is broken: %s", error)
            self._door.send(Unable(str(error)))

    def _serve(self) -> None:
        last_work = time.monotonic()
        while not self._stopping:
            if self._takes_tracks(ENTER_TRACKS):
                self._run_on_tracks()
                last_work = time.monotonic()
                continue
            now = time.monotonic()
            batch = self._loop.next_batch(now)
            if isinstance(batch, Batch):
                self._run(batch)
                last_work = time.monotonic()
                self._heed_all(0.0)
            else:
                self._batch_over = None
                if isinstance(batch, Hold):
                    self._heed_all(max(batch.until - now, 0.0005))
                elif not self._heed_all(0.0):
                    if not self._adopt() and not self._time_teachers(now - last_work):
                        self._heed_all(_IDLE_SECONDS)
                    continue
            if self._adopting:
                self._adopt()  # one between two batches: each is a short pause, and makes every later batch quicker
                self._batch_over = None

    # -- commands ------------------------------------------------------------------------------------------------------

    def _heed_all(self, patience: float) -> bool:
        """Heed every command that is there, waiting for a first one; False where none came."""
        command = self._door.receive(patience)
        found = command is not None
        while command is not None:
            self._heed(command)
            command = self._door.receive(0.0)
        return found

    def _heed(self, command: Command) -> None:
        if isinstance(command, Submit):
            try:
                states = [(state, self._load_latents(state)) for state in command.states]
                self._loop.submit(command.work, time.monotonic(), states, command.elsewhere)
            except torch.AcceleratorError as error:
                raise DeviceBroken(f"{type(error).__name__}: {error}") from error
            except (LookupError, ValueError, RuntimeError) as error:  # such as a schedule that its checkpoint lacks
                self._door.send(Lost(command.work.id, "failed", f"{type(error).__name__}: {error}"))
        elif isinstance(command, Cancel):
            self._loop.cancel(command.id)
        elif isinstance(command, Ping):
            self._door.send(Pong(command.number))
        elif isinstance(command, Adopt):
            self._adopting = True
        elif isinstance(command, UsePolicy):
            try:
                self._loop.policy = make_policy(command.policy, self._seen)
            except ValueError as error:
                log.error("%s", error)
        elif isinstance(command, Stop):
            self._stopping = True

    # -- batches -------------------------------------------------------------------------------------------------------

    def _run(self, batch: Batch) -> None:
        """Run one batch. Where it raises, every ticket is tried once more, alone, and only the guilty fail.

        Raises:
            DeviceBroken: no later batch can succeed.
        """
        error = self._try(batch, last=False)
        if error is not None:
            self._retry(batch, error)

    def _retry(self, batch: Batch, error: Exception) -> None:
        log.warning("a batch of %d at %s raised (%s); trying each alone", len(batch.tickets), batch.key.label, error)
        short = isinstance(error, torch.OutOfMemoryError)
        error.__traceback__ = None  # which keeps the failed batch's tensors: what fits alone must not lack their memory
        if short:
            self._costs.narrow(batch.key, batch.rows * batch.tracks)
            if self._models[batch.key.model].backbone.device.type == "cuda":
                torch.cuda.empty_cache()
        for ticket in batch.tickets:
            single = self._loop.again(ticket, batch.key)
            if single is not None:
                self._try(single, last=True)

    def _try(self, batch: Batch, last: bool) -> Exception | None:
        started = time.perf_counter()
        gap = 0.0 if self._batch_over is None else started - self._batch_over
        try:
            done = self._runners[batch.key.model].run(batch.key, batch.tickets)
            device = self._models[batch.key.model].backbone.device
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except torch.AcceleratorError as error:
            raise DeviceBroken(f"{type(error).__name__}: {error}") from error
        except Exception as error:
            self._loop.raised(batch, error, last)
            if last:
                self._door.send(Busy(_LONGEST_LOAD_SECONDS))  # it may probe
                self._breakers[batch.key.model].failed(batch.key, error)
            return error
        self._batch_over = time.perf_counter()
        self._finish(batch, done, self._batch_over - started, gap)
        return None

    def _finish(self, batch: Batch, done: Done, seconds: float, gap: float) -> None:
        self._breakers[batch.key.model].succeeded(batch.key)
        now = time.monotonic()
        if batch.key.kind == "encode":
            for request in {id(p.request): p.request for p in batch.pictures}.values():
                self._door.send(Encoded(request.work.id, request.text_tokens, request.cut_tokens))
        gone = {ticket.request for ticket in batch.tickets if ticket.request.over}
        self._loop.ended(batch, seconds, now, done.shown, done.rows, gap)
        for ticket, pixels in zip(batch.tickets, done.pixels, strict=bool(done.pixels)):
            ticket.data = None
            if ticket.request in gone:
                continue
            picture, number = (ticket.picture, ticket.number) if isinstance(ticket, Preview) else (ticket, -1)
            assert isinstance(picture, Picture)
            record = picture.record if number < 0 else None
            where = (ticket.request.work.id, picture.index, tuple(pixels.shape), str(batch.key.size), number)
            self._door.send(Pixels(*where, record), pixels)

    # -- several batches at a time -------------------------------------------------------------------------------------

    def _takes_tracks(self, least: int) -> bool:
        """Whether so many wait, at engines that can be run by several threads, that batches go on tracks."""
        if self._most_tracks < 2 or self._adopting or not self._loop.crowded(least):
            return False
        students = [model.live.get(STUDENT) for model in self._models.values()]
        takes = all(live is not None and live.takes_tracks(self._most_tracks) for live in students)
        return takes and isinstance(self._loop.policy, StagewisePolicy)

    def _run_on_tracks(self) -> None:
        """Run several batches at a time while the queues are long. In the end none runs.

        A batch that raised is tried again, ticket by ticket, when the others are over.
        """
        tracks = self._tracks = self._tracks or Tracks(self._most_tracks, torch.get_num_threads())
        failed: list[tuple[Batch, Exception]] = []
        self._batch_over = None
        while True:
            while tracks.free and not (self._stopping or failed) and self._takes_tracks(LEAVE_TRACKS):
                batch = self._loop.next_batch(time.monotonic(), tracks.count)
                if not isinstance(batch, Batch):
                    break
                tracks.start(batch, self._runners[batch.key.model].run)
            if tracks.idle:
                break
            self._door.flush()
            outcome = tracks.wait()
            if isinstance(outcome.done, Exception):
                self._loop.raised(outcome.batch, outcome.done, last=False)
                failed.append((outcome.batch, outcome.done))
            else:
                self._finish(outcome.batch, outcome.done, outcome.seconds, 0.0)
            self._heed_all(0.0)
        for batch, error in failed:
            self._retry(batch, error)

    # -- between batches -----------------------------------------------------------------------------------------------

    def _adopt(self) -> bool:
        """Take over one engine that was built; False where there is none to take over."""
        if not self._adopting:
            return False
        for model in self._models.values():
            for lane, live in model.live.items():
                if not live.complete:
                    self._door.send(Busy(_LONGEST_LOAD_SECONDS))
                place = live.adopt_next()
                if place is not None:
                    self._opened(model, lane, place)
                    return True
        self._adopting = False
        if all(live.complete for model in self._models.values() for live in model.live.values()):
            self._settle()
        return False

    def _opened(self, model: DeviceModel, lane: str, place: tuple[str, str | None]) -> None:
        """Time a station that runs on something else now, and tell."""
        component, size = place
        for key in stations_in(model.card, model.stages):
            at = None if key.size is None else str(key.size)
            if key.lane != lane or COMPONENTS[key.kind] != component or (at != size and size is not None):
                continue
            try:
                costs = measure_station(model.lanes, key, model.max_batch)
            except torch.OutOfMemoryError as error:
                log.warning("%s: its engine could not be timed (%s)", key.label, error)
                costs = {width: self._costs.seconds(key, width) for width in self._costs.widths(key)}
            self._costs.replace(key, costs)
            memory = {name: held for live in model.live.values() for name, held in live.memory().items()}
            buckets = compiled_buckets(model.lanes[lane], key)
            complete = all(live.complete for live in model.live.values())
            serving = model.live[STUDENT].serving
            self._door.send(Changed(key, buckets, tuple(costs.items()), complete, memory, serving))
        self._door.send(Baselines(model.baselines(), model.card.place))

    def _time_teachers(self, quiet: float) -> bool:
        """Time an eager teacher again where nothing has run for a while; False where none is due."""
        for model in self._models.values():
            teacher = model.teacher
            if teacher is None or quiet < _QUIET_SECONDS or not teacher.due:
                continue
            self._door.send(Busy(60.0 + 20.0 * teacher.baseline().guided_step_seconds))
            try:
                teacher.time_again()
            except RuntimeError as error:
                log.warning("the eager teacher is not timed again: %s", error)
                teacher.frozen = True
            self._door.send(Baselines(model.baselines(), model.card.place))
            return True
        return False
