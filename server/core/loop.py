"""The scheduler's state machine: what waits, what runs, and how each request ends. No device, no clock of its own.

Whoever drives it (an engine process, the simulator) does the same few things: hand over requests, ask for the next
batch, run it, and say how it went. Everything that the outside must hear of comes out as messages.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.core.card import ModelCard, step_costs
from server.core.costs import CostTable
from server.core.messages import Began, Encoded, Ended, HandedOver, Lost, Message, Moved
from server.core.policies import Choice, Hold, Policy
from server.core.policies.base import rows_of
from server.core.policies.fifo import FifoPolicy
from server.core.stages import ALL, Stages, costs_in, stations_in
from server.core.stations import StationKey, Stations
from server.core.tickets import Picture, Preview, Request, State, Ticket
from server.core.tracks import TrackCosts
from server.core.work import PictureState, Work

log = logging.getLogger("rmd.server")

_PATIENCE = 3  # times in a row that the policy may raise
_HOPELESS = 0.5  # of the expected work: with less time left than that, a picture cannot be ready by its deadline


@dataclass(frozen=True)
class Batch:
    """Tickets of one station that run together.

    Attributes:
        rows: of the device's batch (encode: texts).
        expected: seconds.
        tracks: it has one of so many equal parts of the device.
    """

    number: int
    key: StationKey
    tickets: Sequence[Ticket]
    rows: int
    expected: float
    tracks: int = 1

    @property
    def pictures(self) -> list[Picture]:
        """Its tickets that are no previews."""
        return [ticket for ticket in self.tickets if isinstance(ticket, Picture)]


class Loop:
    """One engine's queues and rules. Used from one thread.

    Args:
        cards: the models on offer; their places differ.
        costs: of batches; learns from what is run.
        policy: which station runs next, and with whom.
        emit: given each message for the outside.
        film_seconds: a film's time in denoising steps, its own share of batches; waiting is not counted.
        recall: gives a new request its encoded texts where the device has kept them, and says whether it did.
        stages: what is done here. Pictures are handed over behind that.
        dump: returns the shape and the bytes of what the device keeps of a picture, see :class:`PictureState`.
        seen: the costs as the policy was given them, where it can choose for a track.
    """

    def __init__(
        self,
        cards: Sequence[ModelCard],
        costs: CostTable,
        policy: Policy,
        emit: Callable[[Message], None],
        film_seconds: float = 3600.0,
        recall: Callable[[Request], bool] = lambda request: False,
        stages: Stages = ALL,
        dump: Callable[[Any], tuple[tuple[int, ...], bytes]] = lambda data: ((), b""),
        seen: TrackCosts | None = None,
    ) -> None:
        self.costs, self.policy, self._seen = costs, policy, seen
        self._stages, self._dump = stages, dump
        self._cards, self._emit, self._film_seconds = {card.place: card for card in cards}, emit, film_seconds
        self._stations = Stations(key for card in cards for key in stations_in(card, stages))
        self._requests: dict[str, Request] = {}
        self._leaving: list[HandedOver] = []
        self._numbers = itertools.count(1)
        self._recall = recall
        self._policy_raised = 0

    # -- requests ------------------------------------------------------------------------------------------------------

    def submit(
        self,
        work: Work,
        now: float,
        states: Sequence[tuple[PictureState, Any]] = (),
        elsewhere: Stages = frozenset(),
    ) -> None:
        """Take a request, or more of one. What this engine has of it already is left as it is.

        Args:
            states: pictures that other engines handed over, and their data as the device takes it.
            elsewhere: stages of these pictures that are not to be done here.

        Raises:
            LookupError: there is no such model or schedule here.
            ValueError: a picture was begun with other files of the model.
        """
        card = self._cards[work.model]
        if any(state.fingerprint != card.fingerprint for state, _ in states):
            raise ValueError(
                f"it was begun with other files of the model '{card.model_id}' than this engine has: replace all "
                f"engines of a cascade together"
            )
        request = self._requests.get(work.id)
        if request is None:
            request = self._requests[work.id] = self._request(work)
            arriving: list[Ticket] = list(request.pictures)
        else:
            arriving = list(request.take(work))
        for state, data in states:
            ticket = request.take_up(state, data)
            if ticket is not None:
                arriving.append(ticket)
        if request.complete:
            del self._requests[work.id]
            return
        if request.conditioning is None and self._recall(request):
            self._emit(Encoded(work.id, request.text_tokens, request.cut_tokens))
        for ticket in arriving:
            if isinstance(ticket, Picture):
                ticket.elsewhere = elsewhere
            self._stations.join(ticket.station(), ticket, now)

    def _request(self, work: Work) -> Request:
        schedule = self._cards[work.model].schedules[work.schedule]
        cascade = schedule.changed(work.guidance_scale, work.noise_intensity)
        costs = step_costs(self.costs, cascade, schedule.lane, model=work.model, partial_images=work.partial_images)
        return Request(work, cascade, schedule.lane, costs_in(costs, cascade, self._stages))

    def cancel(self, request_id: str) -> None:
        """Forget a request: what waits leaves its queue, what runs is dropped when its batch ends."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._end(request)

    def give_up(self) -> None:
        """Forget every request."""
        for request_id in list(self._requests):
            self.cancel(request_id)

    @property
    def idle(self) -> bool:
        """True where nothing waits."""
        return next(self._stations.waiting(), None) is None

    def crowded(self, least: int) -> bool:
        """Whether at least so many tickets wait, none of which is to run with the device to itself.

        Nor a film: beside one on a track of its own, a picture alone would take twice its time.
        """
        works = [ticket.request.work for ticket in self._stations.waiting()]
        return len(works) >= least and not any(work.alone or work.film for work in works)

    @property
    def stations(self) -> Stations:
        """The queues, to look at."""
        return self._stations

    # -- batches -------------------------------------------------------------------------------------------------------

    def next_batch(self, now: float, tracks: int = 1) -> Batch | Hold | None:
        """Take the next batch out of its queue; say that it begins.

        Args:
            tracks: of which it gets one.
        """
        self._drop_late(now)
        if self._seen is not None:
            self._seen.count = tracks
        choice = self._choose(now)
        if not isinstance(choice, Choice):
            return choice
        tickets = _apart(choice.tickets)
        self._stations.take(choice.station, tickets)
        key, rows = choice.station.key, sum(rows_of(tickets, choice.station))
        for ticket in tickets:
            ticket.state = State.RUNNING
            if isinstance(ticket, Picture):
                ticket.record.queue += now - ticket.joined
        return self._begin(key, tickets, rows, tracks)

    def _choose(self, now: float) -> Choice | Hold | None:
        """Ask the policy. Where it raises, whoever makes it raise has failed, and the others are served."""
        try:
            choice = self.policy.choose(self._stations, now)
        except Exception as error:
            log.exception("the policy raised")
            self._find_guilty(error, now)
            return FifoPolicy(self.costs).choose(self._stations, now)
        self._policy_raised = 0
        return choice

    def _find_guilty(self, error: Exception, now: float) -> None:
        """Fail the requests that the policy cannot even bear alone; those of several that are all so are innocent."""
        waiting = {ticket.request.work.id: ticket.request for ticket in self._stations.waiting()}
        guilty = [request for request in waiting.values() if self._unbearable(request, now)]
        self._policy_raised += 1
        if self._policy_raised >= _PATIENCE or 1 < len(guilty) == len(waiting):
            log.error("the policy raised again and again: fifo from now on")
            self.policy = FifoPolicy(self.costs)
            return
        for request in guilty:
            self._requests.pop(request.work.id, None)
            self._end(request)
            self._emit(Lost(request.work.id, "failed", f"the policy raised {type(error).__name__}: {error}"))

    def _unbearable(self, request: Request, now: float) -> bool:
        alone = Stations()
        for station in self._stations:
            alone.open([station.key])
        for ticket in list(self._stations.waiting()):
            if ticket.request is request:
                alone.join(ticket.station(), ticket, ticket.joined)
        try:
            self.policy.choose(alone, now)
        except Exception:
            return True
        return False

    def _charge(self, work: Work, seconds: float) -> None:
        try:
            self.policy.charge(work, seconds)
        except Exception:  # its bookkeeping costs nobody a picture that is made
            log.exception("the policy raised")

    def again(self, ticket: Ticket, key: StationKey) -> Batch | None:
        """Return a batch of one ticket of a batch that raised; None where it has ended meanwhile."""
        if ticket.request.over:
            ticket.state = State.LEFT
            return None
        return self._begin(key, [ticket], ticket.rows if key.kind != "encode" else 1)

    def _begin(self, key: StationKey, tickets: Sequence[Ticket], rows: int, tracks: int = 1) -> Batch:
        expected = self.costs.seconds(key, max(rows, 1) * tracks)
        batch = Batch(next(self._numbers), key, tickets, rows, expected, tracks)
        members = tuple((t.request.work.id, t.index) for t in batch.pictures)
        previews = tuple(t.request.work.id for t in tickets if isinstance(t, Preview))
        self._emit(Began(batch.number, key, members, previews, batch.expected))
        return batch

    def ended(
        self, batch: Batch, seconds: float, now: float, shown: Mapping[Picture, Any], rows: int, gap: float = 0.0
    ) -> None:
        """Account for a batch that ran and send its tickets on.

        Args:
            seconds: that it took.
            gap: seconds between the batch before and this one, with work at hand: every batch costs these too, so
                few wide ones are cheaper than many narrow ones that are as quick a row.
            shown: for pictures whose step's result is to be shown, that result.
            rows: really run; 0 where there was nothing to do.
        """
        company = rows if batch.key.kind == "encode" else len(batch.tickets)
        if rows:
            self.costs.observe(batch.key, rows * batch.tracks, seconds + gap)
            self._account(batch, seconds, rows, company)
        moved = []
        for ticket in batch.tickets:
            if batch.key.kind == "denoise" and isinstance(ticket, Picture):
                if ticket in shown and not ticket.request.over:
                    self._show(ticket, shown[ticket], batch.key, now)
                ticket.step += 1
            moved.append(self._hand_on(ticket, batch.key, now))
        onward = tuple(each for each in moved if each is not None)
        self._emit(Ended(batch.number, batch.key, rows, company, seconds, onward, at=now, tracks=batch.tracks))
        while self._leaving:
            self._emit(self._leaving.pop(0))

    def raised(self, batch: Batch, error: Exception, last: bool) -> None:
        """Account for a batch that raised. Where it was its tickets' last try, their requests have failed."""
        self._emit(Ended(batch.number, batch.key, 0, len(batch.tickets), 0.0, (), "lost" if last else "retried"))
        if not last:
            return
        for ticket in batch.tickets:
            ticket.state = State.LEFT
            if isinstance(ticket, Preview):  # a partial picture is a courtesy; the picture itself goes on
                self._left(ticket)
                continue
            request = self._requests.pop(ticket.request.work.id, None)
            if request is not None:
                self._end(request)
                self._emit(Lost(request.work.id, "failed", f"{type(error).__name__}: {error}"))

    def _hand_on(self, ticket: Ticket, key: StationKey, now: float) -> Moved | None:
        if isinstance(ticket, Preview):
            self._left(ticket)
            return None
        assert isinstance(ticket, Picture)
        request = ticket.request
        station = None
        if key.kind == "decode" or request.over:
            self._left(ticket)
        elif ticket.stage not in self._stages - ticket.elsewhere:
            station = ticket.station()
            self._leaving.append(ticket.handed_over(self._dump(ticket.data), self._fingerprint(ticket)))
            request.pictures.remove(ticket)
            self._left(ticket)
        else:
            ticket.state = State.WAITING
            station = ticket.station()
            self._stations.join(station, ticket, now)
        return Moved(request.work.id, ticket.index, ticket.step, station)

    def _left(self, ticket: Ticket) -> None:
        """A ticket has left; with the last one its request is forgotten."""
        request, ticket.state = ticket.request, State.LEFT
        if isinstance(ticket, Preview):
            if ticket not in request.guests:
                return
            request.guests.remove(ticket)
        if request.complete and self._requests.get(request.work.id) is request:
            del self._requests[request.work.id]
            self._end(request)

    def _show(self, picture: Picture, data: Any, key: StationKey, now: float) -> None:
        assert key.size is not None
        number = picture.request.shown.index(picture.step)
        # Where its picture leaves too, nothing of the request stays here.
        if picture.elsewhere or not self._stages >= {"high", "decode"}:
            self._leaving.append(picture.handed_over(self._dump(data), self._fingerprint(picture), number, key.size))
            return
        preview = Preview(picture, data, key.size, number)
        self._stations.join(preview.station(), preview, now)

    def _fingerprint(self, picture: Picture) -> str:
        return self._cards[picture.request.work.model].fingerprint

    def _account(self, batch: Batch, seconds: float, rows: int, company: int) -> None:
        label = batch.key.label
        for ticket in batch.tickets:
            own = ticket.rows if batch.key.kind == "denoise" else 1
            share = seconds * own / max(rows, len(batch.tickets) if batch.key.kind != "denoise" else rows)
            share /= batch.tracks
            self._charge(ticket.request.work, share)
            if not isinstance(ticket, Picture):
                continue
            record = ticket.record
            record.charged += share
            record.batches.setdefault(label, []).append(company)
            if batch.key.kind == "encode":
                record.encode += seconds
            elif batch.key.kind == "decode":
                record.decode += seconds
            else:
                record.stages[label] = record.stages.get(label, 0.0) + seconds
                ticket.stepped += share

    # -- endings -------------------------------------------------------------------------------------------------------

    def _drop_late(self, now: float) -> None:
        """Give up what waits and has missed its deadline, or is bound to."""
        waiting = [ticket for ticket in self._stations.waiting() if isinstance(ticket, Picture)]
        # Alone in the house it is tried whatever it seems to cost: nothing else would teach the table better.
        company = len({ticket.request.work.id for ticket in waiting}) > 1
        hopeless = _HOPELESS if company else 0.0
        late = {
            ticket.request.work.id: ticket.request
            for ticket in waiting
            if self._time_left(ticket, now) <= hopeless * ticket.remaining_seconds
        }
        for request_id, request in late.items():
            self._requests.pop(request_id, None)
            self._end(request)
            self._emit(Lost(request_id, "late", ""))

    def _time_left(self, picture: Picture, now: float) -> float:
        """A picture's until its deadline. Of a film only its own work counts, not that of its company."""
        if picture.request.work.film:
            return self._film_seconds - picture.stepped
        return picture.request.work.deadline - now

    def _end(self, request: Request) -> None:
        request.over = True
        for ticket in self._stations.remove(lambda ticket: ticket.request is request):
            ticket.state = State.LEFT


def _apart(tickets: Sequence[Ticket]) -> list[Ticket]:
    """Keep suspects apart: a request that was in a batch which ended an engine has no company until it is done."""
    if tickets[0].request.work.alone:
        return [ticket for ticket in tickets if ticket.request is tickets[0].request]
    return [ticket for ticket in tickets if not ticket.request.work.alone]
