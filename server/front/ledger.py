"""The accepted requests of one front: where their pictures are, what they are told, and how each one ends."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from server.core.card import ModelCard
from server.core.faults import Fault, RequestError, deadline_error, machine_lacks
from server.core.messages import Began, Encoded, Ended, HandedOver, Lost, Pixels
from server.core.promises import in_a_while
from server.core.stages import ALL, Stages
from server.core.stations import StationKey
from server.front.generation import Advanced, Event, Failed, FinishedPicture, Generation, PartialPicture, Place
from server.front.packaging import Packager
from server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from server.telemetry.tracing import Member

log = logging.getLogger("rmd.server")

GRACE_SECONDS = 1.0
"""Behind a deadline, before the front ends a request that its engine says nothing of."""

PACKAGE = "package"


class Ledger:
    """See the module. Every method but the constructor's takes the lock, which may be held already.

    Args:
        metrics: where batches and pictures are counted.
        package_threads: threads that compress pictures.
        on_end: told of a request that ends early, so that its engine forgets it.
        on_picture: told of each finished picture.
    """

    def __init__(
        self,
        metrics: Metrics,
        package_threads: int,
        on_end: Callable[[Generation], None],
        on_picture: Callable[[Generation, FinishedPicture], None],
    ) -> None:
        self.lock = threading.RLock()
        self._metrics, self._on_end, self._on_picture = metrics, on_end, on_picture
        self._generations: dict[str, Generation] = {}
        self._packaging = 0
        self._packager = Packager(package_threads, self._packaged)

    # -- to look at ----------------------------------------------------------------------------------------------------

    def all(self) -> list[Generation]:
        """Every request that has not ended."""
        with self.lock:
            return list(self._generations.values())

    def depths(self, stations: Iterable[StationKey]) -> dict[str, int]:
        """Return how many pictures wait at each station, by label."""
        with self.lock:
            depths = Counter(dict.fromkeys((key.label for key in stations), 0))
            for generation in self._generations.values():
                for place in generation.places:
                    if place.station is not None and not place.running and not place.left:
                        depths[place.station.label] += 1
            depths[PACKAGE] = self._packaging
            return dict(depths)

    def work_before(self, work: float, engine: int | None = None, stages: Stages = ALL) -> float:
        """Return the expected work (seconds) that goes before a newcomer's; whoever needs more than it is passed.

        Args:
            work: of the newcomer.
            engine: only what this one has.
            stages: only at these.
        """
        with self.lock:
            return sum(
                min(generation.remaining(place, stages), work)
                for generation in self._generations.values()
                for place in generation.places
                if engine is None or place.engine == engine
            )

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(self, generation: Generation) -> None:
        """Take a request in."""
        with self.lock:
            self._generations[generation.id] = generation

    def begin_again(self, generation: Generation, engine: int, suspect: bool) -> None:
        """Note that an engine is lost: what it had of a request begins anew, or as it was last handed over.

        Args:
            engine: its number.
            suspect: the request was in the batch that ran, so from now on it has no company.
        """
        with self.lock:
            places = generation.places
            lost = [i for i, place in enumerate(places) if place.engine == engine and not (place.decoded or place.left)]
            shown = [place for place in generation.previews.values() if place.engine == engine]
            if not (lost or shown):
                return
            generation.strikes += suspect
            generation.work = msgspec.structs.replace(generation.work, alone=generation.strikes > 0)
            if generation.trace is not None:
                generation.trace.engine_lost(lost)
            for place in shown:
                place.engine = None
            for index in lost:
                places[index] = generation.place(places[index].state)

    def handed_over(self, message: HandedOver, engine: int) -> Generation | None:
        """Keep what is needed to go on with a picture, or a partial one, that has left its engine; say whose it is.

        Args:
            engine: its number.
        """
        with self.lock:
            generation, state = self._generations.get(message.id), message.state
            if generation is None:
                return None
            if state.number < 0:
                if generation.places[state.index].engine != engine:
                    return None
                generation.places[state.index] = generation.place(state)  # another one, which no engine has
            elif (state.index, state.number) not in generation.shown:  # else from an engine that was lost
                generation.previews.setdefault((state.index, state.number), Place(None, state.step, state=state))
            return generation

    def end_late(self) -> None:
        """End what is well past its deadline, whatever its engine does."""
        with self.lock:
            for generation in self.all():
                if not generation.spec.film and generation.seconds_left() < -GRACE_SECONDS:
                    self.settle(generation, deadline_error())

    def fail(self, generation: Generation, reason: str) -> None:
        """Fail a request with 500; the reason goes to the log, not to the client."""
        ids = {} if generation.facts is None else generation.facts.ids
        log.error("request %s failed: %s", generation.id, reason, extra={"facts": {"request_id": generation.id, **ids}})
        text = "The model failed on this request; others are not affected."
        self.settle(generation, RequestError(Fault.ENGINE_FAILED, text))

    def settle(self, generation: Generation, error: RequestError) -> None:
        """End a request early, once, and give its places back before its client hears of it."""
        with self.lock:
            if generation.over:
                return
            left = sum(not place.left for place in generation.places)
            self._metrics.dropped.labels(error.fault.value.outcome).inc(left)
            generation.failed = True
            if generation.trace is not None:
                generation.trace.ended(error.fault.value.outcome)
            self._on_end(generation)
            for place in generation.places:
                self._leave(generation, place)
            generation.sink(Failed(error))

    def close(self) -> None:
        """Finish the packaging that was begun."""
        self._packager.close()

    # -- what engines say ----------------------------------------------------------------------------------------------

    def began(self, message: Began) -> None:
        """A batch runs."""
        with self.lock:
            for request_id, index in message.members:
                generation = self._generations.get(request_id)
                if generation is None:
                    continue
                place = generation.places[index]
                place.running = True
                if generation.spec.film and message.key.kind == "denoise" and place.step == 0:
                    generation.sink(Advanced(0.0))

    def ended(self, message: Ended, members: Sequence[tuple[str, int]], card: ModelCard | None) -> None:
        """A batch with these members is over."""
        with self.lock:
            for request_id, index in members:
                if request_id in self._generations:
                    self._generations[request_id].places[index].running = False
            self._count_batch(message, card)
            for moved in message.moved:
                generation = self._generations.get(moved.id)
                if generation is None:
                    continue
                place = generation.places[moved.index]
                place.step, place.station = moved.step, moved.station
                if generation.spec.film and message.key.kind == "denoise":
                    generation.sink(Advanced(1.0 - generation.remaining(place) / max(generation.costs[0], 1e-9)))

    def trace(self, began: Began, ended: Ended, at: float, engine: int) -> None:
        """Write down a batch for the traces of those in it; before :meth:`ended`, which moves them on.

        Args:
            at: when it ended, seconds since 1970.
        """
        with self.lock:
            known = self._generations
            traced: list[Member] = []
            for request_id, index in (*began.members, *((request_id, None) for request_id in began.previews)):
                generation = known.get(request_id)
                if generation is not None and generation.trace is not None:
                    step = 0 if index is None else generation.places[index].step
                    traced.append((generation.trace, index, step))
            if traced:
                from server.telemetry.tracing import trace_batch

                trace_batch(began, ended, at, engine, traced)

    def encoded(self, message: Encoded) -> None:
        """A text is known."""
        with self.lock:
            generation = self._generations.get(message.id)
            if generation is not None:
                generation.text_tokens, generation.cut_tokens = message.tokens, message.cut

    def decoded(self, message: Pixels, pixels: memoryview) -> None:
        """Pixels are here. What has come before, from an engine that was lost, is left."""
        with self.lock:
            generation = self._generations.get(message.id)
            if generation is None:
                return
            if message.number >= 0:
                generation.previews.pop((message.index, message.number), None)
                if (message.index, message.number) in generation.shown:
                    return
                generation.shown.add((message.index, message.number))
            else:
                place = generation.places[message.index]
                if place.decoded:
                    return
                place.decoded, place.station, place.state = True, None, None
            self._packaging += 1
            self._packager.submit(generation, message, pixels)

    def lost(self, message: Lost) -> None:
        """An engine has given a request up."""
        with self.lock:
            generation = self._generations.get(message.id)
            if generation is None:
                return
            if message.why == "late":
                self.settle(generation, deadline_error())
            else:
                self.fail(generation, message.reason)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _packaged(self, generation: Generation, message: Pixels, result: Event | Exception | None) -> None:
        """Called by the pool's threads; no result where the request had ended before."""
        with self.lock:
            self._packaging -= 1
            if generation.failed or result is None:
                return
            if isinstance(result, Exception):
                lacking = machine_lacks(result)
                if message.number >= 0:  # a partial picture is a courtesy
                    return
                if lacking is not None:
                    text = f"The server has too little {lacking} just now; try again after the seconds in Retry-After."
                    self.settle(generation, RequestError(Fault.LACKING, text, retry_after=in_a_while(5)))
                else:
                    self.fail(generation, f"{type(result).__name__}: {result}")
                return
            if isinstance(result, PartialPicture) and generation.places[message.index].left:
                return  # its picture has passed it
            if isinstance(result, PartialPicture) and not generation.partial:
                generation.partial = True
                generation.took(self._metrics.first_partial_seconds, time.monotonic() - generation.arrived)
            if isinstance(result, FinishedPicture):
                self._count_picture(generation, result)
                if generation.trace is not None:
                    generation.trace.packaged(message.index, result.record.package)
                self._leave(generation, generation.places[message.index])  # its place is free before its client hears
            generation.sink(result)

    def _leave(self, generation: Generation, place: Place) -> None:
        """Count a picture out, once."""
        if not place.left:
            place.left, place.running, place.station = True, False, None
            generation.permit.leave(finished=not generation.failed)
        if all(each.left for each in generation.places):
            self._generations.pop(generation.id, None)
            if generation.previews and not generation.failed:
                self._on_end(generation)  # nobody waits any more for what is still to be shown

    def _count_batch(self, message: Ended, card: ModelCard | None) -> None:
        metrics, label = self._metrics, message.key.label
        if message.failed == "retried":
            metrics.retried_batches.labels(label).inc()
        if not message.rows:
            return
        metrics.batch_size.labels(label).observe(message.company)
        metrics.step_seconds.labels(label).observe(message.seconds)
        if message.key.kind == "denoise" and card is not None:
            metrics.steps.labels(label).inc(message.company)
            metrics.tokens.labels(label).inc(message.rows * card.tokens.get(str(message.key.size), 0))

    def _count_picture(self, generation: Generation, picture: FinishedPicture) -> None:
        schedule, record = generation.spec.label, picture.record
        if generation.facts is not None:
            generation.facts.took("queue", record.queue)
            generation.facts.took("compute", record.compute)
        model = generation.model_id
        self._metrics.pictures.labels(model, schedule).inc()
        generation.took(self._metrics.queue_seconds, record.queue)
        self._metrics.decode_seconds.labels(model).observe(record.decode)
        for stage, seconds in record.stages.items():
            self._metrics.stage_seconds.labels(model, schedule, stage).observe(seconds)
        self._on_picture(generation, picture)
