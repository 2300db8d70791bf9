"""The engines behind one front: places work where it is finished first, and loses none of it.

One thread speaks with all engines. What has been accepted stays in the front's hands until its pixels are here: an
engine that dies or hangs is ended and started again, and its work handed out anew. Noise is keyed by (seed, step), so
the pictures are the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import zmq

from server.core.card import ModelCard
from server.core.faults import Fault, RequestError
from server.core.messages import (
    Adopt,
    Baselines,
    Began,
    Busy,
    Changed,
    Encoded,
    Ended,
    HandedOver,
    Leaving,
    Loading,
    Lost,
    Message,
    Ping,
    Pixels,
    Ready,
    Unable,
)
from server.core.promises import in_a_while
from server.front.engine import EngineLink
from server.front.generation import FinishedPicture, Generation
from server.front.ledger import Ledger
from server.front.member import Health, Member, WatchLimits
from server.front.members import Members, Starts
from server.front.placing import Placing
from server.telemetry.metrics import Metrics

log = logging.getLogger("rmd.server")

_LOOK_SECONDS = 0.2
_STOOD_STILL_SECONDS = 2.0  # between two looks: the machine was paused, or had no time for the front
_MOST_STRIKES = 2


class Fleet:
    """See the module.

    Args:
        starts: by device, what starts an engine on it; none where engines are enlisted.
        metrics: where batches and pictures are counted.
        package_threads: threads that compress pictures.
        limits: when an engine counts as hung.
        on_progress: told (done, total, what) while the first engine loads.
        on_ready: told each time an engine is ready, with its cards.
        on_failed: told why, once no engine is left or will come.
        on_picture: told of each finished picture.
    """

    def __init__(
        self,
        starts: Starts,
        metrics: Metrics,
        *,
        package_threads: int = 2,
        limits: WatchLimits | None = None,
        on_progress: Callable[[int, int, str], None] = lambda done, total, text: None,
        on_ready: Callable[[Sequence[ModelCard]], None] = lambda cards: None,
        on_failed: Callable[[str], None] = lambda reason: None,
        on_picture: Callable[[Generation, FinishedPicture], None] = lambda generation, picture: None,
    ) -> None:
        self.members = Members(starts, limits or WatchLimits())
        self._metrics = metrics
        for member in self.members:  # from the start: a counter that appears with its first end hides it from alerts
            metrics.engine_restarts.labels(str(member.index))
            metrics.device_busy_seconds.labels(str(member.index))
        self._on_progress, self._on_ready = on_progress, on_ready
        self._on_failed = on_failed
        self._ledger = Ledger(metrics, package_threads, self._forget, on_picture)
        self._lock = self._ledger.lock
        self.placing = Placing(self.members, self._ledger)
        self._outbox = self.placing.outbox
        self._stopping = self._ended = False
        self._last_batches: dict[int, int] = {}  # by engine: what ran when the stop came
        self._given_up = ""
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._main, name="rmd-fleet", daemon=True)

    # -- called from any thread ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every engine."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once no engine is left or will come."""
        return self._thread.is_alive() and not self._given_up

    @property
    def ready(self) -> bool:
        """Whether engines take work now, at every stage."""
        return not self.members.lacking

    @property
    def cards(self) -> dict[str, ModelCard]:
        """The models that engines hold, by place; see :attr:`Members.cards`."""
        return self.members.cards

    def enlist(self, engines: Mapping[str, Callable[[], EngineLink]], foreign: Mapping[str, float]) -> None:
        """Say which engines there are that others start; called again and again.

        New ones join. Those that are not named any more stay until they end, and then are not looked for again.

        Args:
            engines: by name, what finds an engine.
            foreign: by name, the expected work (seconds) that it has from other fronts.
        """
        with self._lock:
            self.members.enlist(engines, foreign)
        self._wake()

    def work(self) -> dict[str, float]:
        """Return the expected work (seconds) of what was accepted, by its engine; "": of what none has yet."""
        with self._lock:
            return self.placing.work()

    def submit(self, generation: Generation) -> None:
        """Take an admitted request.

        Raises:
            RequestError: 503 where the fleet is stopping or has no engine left.
        """
        with self._lock:
            if self._stopping or self._given_up:
                raise self._end_error()
            self._ledger.add(generation)
            self._place(generation)
        self._wake()

    def cancel(self, generation: Generation, error: RequestError) -> None:
        """End a request early. Does nothing where it has ended already."""
        self._ledger.settle(generation, error)
        self._wake()

    def adopt(self) -> None:
        """Engines have been built: have them taken over."""
        with self._lock:
            for member in self.members:
                if member.health is Health.READY:
                    self._outbox.append((member, Adopt()))
        self._wake()

    def depths(self) -> dict[str, int]:
        """Return how many pictures wait at each station, by label."""
        return self._ledger.depths(key for card in self.cards.values() for key in card.stations())

    def stop(self, timeout: float) -> None:
        """Let the batches that run finish, fail whatever is left with 503, and end every engine."""
        with self._lock:
            self._stopping = True
            running = set[str]()
            for member in self.members:  # what an engine wrote down itself is newer than what has been heard of it
                batches = () if member.link is None else member.link.last_batches()
                if batches:
                    self._last_batches[member.index] = min(batch.batch for batch in batches)
                running.update(request_id for batch in batches for request_id, _ in batch.members)
            for generation in self._ledger.all():
                if generation.id not in running and not any(place.decoded for place in generation.places):
                    self._ledger.settle(generation, self._end_error())
        self._wake()
        end = time.monotonic() + timeout
        while self._thread.is_alive() and time.monotonic() < end and self._ledger.all():
            time.sleep(0.01)
        for generation in self._ledger.all():
            self._ledger.settle(generation, self._end_error())
        self._ended = True
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._ledger.close()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._serve()
        except Exception as error:  # whatever it is, nobody is to wait for ever for what no thread looks after
            log.exception("the fleet's thread broke")
            with self._lock:
                self._give_up(f"{type(error).__name__}: {error}")
        finally:
            for member in self.members:
                if member.link is not None:
                    member.link.stop(2.0)
                    member.link.close()

    def _serve(self) -> None:
        for member in self.members:
            member.start()
        with self._lock:
            self._give_up_if_dead()
        looked = time.monotonic()
        while not self._ended:
            self._send_all()
            self._hear_all(_LOOK_SECONDS)
            now = time.monotonic()
            if now - looked < _LOOK_SECONDS:
                continue
            with self._lock:
                if now - looked > _STOOD_STILL_SECONDS:
                    for member in self.members:
                        member.forgive(now - looked)
                self._look()
            looked = now

    def _send_all(self) -> None:
        with self._lock:
            while self._outbox:
                member, command = self._outbox.popleft()
                if member.link is not None and member.health is not Health.DOWN:
                    member.link.send(command)

    def _hear_all(self, patience: float) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_read, zmq.POLLIN)
        by_socket = {m.link.socket: m for m in self.members if m.link is not None}
        for each in by_socket:
            poller.register(each, zmq.POLLIN)
        for source, _ in poller.poll(int(1000 * patience)):
            if source == self._wake_read:
                os.read(self._wake_read, 4096)
            elif source in by_socket:
                self._hear(by_socket[source])

    def _hear(self, member: Member) -> None:
        """Take in everything that an engine has said."""
        while member.link is not None:
            try:
                received = member.link.receive()
            except (msgspec.DecodeError, StopIteration) as error:  # it is of another version, or ill
                log.error("the engine on %s says what means nothing here: %s", member.device, error)
                member.reason = "it speaks another version's language"
                member.link.kill()
                return
            if received is None:
                return
            with self._lock:
                member.heard()
                self._heed(member, *received)

    def _look(self) -> None:
        """Look after engines and deadlines. Called with the lock held."""
        self.members.forget_gone()
        for member in self.members:
            if member.link is None:
                if member.restart_due and self.members.named(member) and not self._stopping:
                    self._start_again(member)
                continue
            if not member.link.running:
                self._hear(member)  # its last words, and pictures
                ended = "its connection broke" if member.enlisted else "its process ended"
                self._lost(member, member.reason or ended)
                continue
            hung = member.hung()
            if hung:
                member.link.kill()
                self._hear(member)
                self._lost(member, f"{hung}; it was ended")
            elif member.ping_due():
                member.link.send(Ping(0))
        self._ledger.end_late()

    def _start_again(self, member: Member) -> None:
        if not member.enlisted:
            member.restarts += 1
            self._metrics.engine_restarts.labels(str(member.index)).inc()
        member.start()
        self._give_up_if_dead()

    # -- what engines say (called with the lock held) ------------------------------------------------------------------

    def _heed(self, member: Member, message: Message, pixels: memoryview | None) -> None:
        if isinstance(message, Began):
            member.began(message)
            self._ledger.began(message)
        elif isinstance(message, Ended):
            began = member.ended(message)
            if began is not None:
                self._ledger.trace(began, message, member.time_of(message), member.index)
            if message.rows:
                self._metrics.device_busy_seconds.labels(str(member.index)).inc(message.seconds / message.tracks)
            members = () if began is None else began.members
            self._ledger.ended(message, members, member.cards.get(message.key.model))
            if self._stopping and message.batch >= self._last_batches.get(member.index, 0):
                # The batches that run are finished, and no further ones of theirs.
                onward = {moved.id for moved in message.moved if moved.station is not None}
                for generation in self._ledger.all():
                    if generation.id in onward:
                        self._ledger.settle(generation, self._end_error())
        elif isinstance(message, Pixels):
            if pixels is not None:
                self._ledger.decoded(message, pixels)
        elif isinstance(message, HandedOver):
            handed = self._ledger.handed_over(message, member.index)
            if handed is not None:
                self._place(handed)
        elif isinstance(message, Encoded):
            self._ledger.encoded(message)
        elif isinstance(message, Lost):
            self._ledger.lost(message)
        elif isinstance(message, Loading):
            if not self.members.known:
                self._on_progress(message.done, message.total, message.text)
        elif isinstance(message, Ready):
            member.ready(message)
            self._give_up_if_dead()
            self._on_ready(message.cards)
            if not all(card.complete for card in message.cards):  # what was built while it loaded
                self._outbox.append((member, Adopt()))
            self._place_all()
        elif isinstance(message, Changed):
            member.changed(message)
        elif isinstance(message, Busy):
            member.excuse(message.seconds)
        elif isinstance(message, Baselines):
            member.timed_teacher(message)
        elif isinstance(message, Leaving):
            member.health = Health.LEAVING
        elif isinstance(message, Unable):
            member.reason, member.usage = message.reason, message.usage

    # -- placing (called with the lock held) ---------------------------------------------------------------------------

    def _place(self, generation: Generation) -> None:
        self.placing.place(generation)

    def _place_all(self) -> None:
        for generation in self._ledger.all():
            self._place(generation)
        self._send_all()

    def _forget(self, generation: Generation) -> None:
        self.placing.forget(generation)

    def _lost(self, member: Member, reason: str) -> None:
        """An engine has ended: hand its work out again."""
        leaving = member.health is Health.LEAVING  # then it was not its batch that ended it
        log.log(logging.INFO if leaving else logging.ERROR, "the engine on %s is lost: %s", member.device, reason)
        batches = () if member.link is None or leaving else member.link.last_batches()
        suspects = {request_id for batch in batches for request_id, _ in batch.members}
        suspects.update(request_id for batch in batches for request_id in batch.previews)
        member.reason = member.reason or reason
        member.lost()
        for generation in self._ledger.all():
            self._ledger.begin_again(generation, member.index, suspect=generation.id in suspects)
            if generation.strikes >= _MOST_STRIKES:
                self._ledger.fail(generation, f"{_MOST_STRIKES} engines ended while they worked on it")
        self._give_up_if_dead()
        self._place_all()

    def _give_up_if_dead(self) -> None:
        reason = self.members.all_dead
        if not self._given_up and reason is not None:
            self._give_up(reason or "its engine has ended")

    def _give_up(self, reason: str) -> None:
        self._given_up = reason
        for generation in self._ledger.all():
            self._ledger.settle(generation, self._end_error())
        self._on_failed(reason)

    def _end_error(self) -> RequestError:
        text = "The server's device failed." if self._given_up else "The server is stopping."
        return RequestError(Fault.NOT_READY if self._given_up else Fault.DRAINING, text, retry_after=in_a_while(1))

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # then enough has been written to wake it
            os.write(self._wake_write, b"!")
