"""Batches per cascade stage: the rule this server is made for.

Every station offers its waiting tickets, ranked, in each of its widths. The batch runs that retires most work a second,
each ticket counted by how much it has been slowed so far:

    worth = sum over the batch of ((wait + work) / work) ^ patience
            x seconds of one row alone / (seconds of the batch + seconds wasted x everybody who waits)

What is summed is the *response ratio*: what is nearly finished gains quickest, so late stages go before early ones and
four-step students before fifty-step teachers, and under overload every request is slowed by about the same factor.
Patience above 1 guards the slowest of a hundred: what has waited long gains on what is nearly finished.

One row's seconds over the batch's is what company saves: a wide batch at a low stage, where it costs little more than
one row, outweighs one picture at the high stage. *Wasted* are the seconds that the batch takes beyond what its rows
would take in the best company that is on its way to the station, and a wasted second is everybody's. So with few in the
house a picture is decoded as soon as it can be, and the longer the queues are the fuller the batches, up to the
throughput of the best widths; nothing has to be set for a load or a machine.

Since a long request may not win its turn before its deadline that way, what is about to miss its deadline goes first.

Films and pictures do not weigh against each other that way: a film that waits in a long line, with nobody looking on,
would hold up every picture. Where both wait, the kind goes first that the device has worked less on of late: pictures
up to half of the device's time pass films as if they were alone, and beyond that each has its half. Time in which no
film was there is no claim of films: they would otherwise hold up every picture for seconds when they come. And since a
picture waits for the batch that runs, films' batches stay short while pictures are about.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.core.costs import CostTable
from server.core.policies.base import Choice
from server.core.policies.fairness import Shares
from server.core.stations import Station, Stations
from server.core.tickets import Picture, Preview, Request, Ticket
from server.core.work import Work

_LEAST_WORK = 1e-4
_URGENT = 2.0  # times its own work is left until its deadline
_ABOUT = 0.1  # seconds of the device that pictures have had of late, where some are about
_LONGEST = 0.35  # seconds of a batch of several films while they are

Rank = tuple[int, float]
"""(about to miss its deadline: 2, of the kind that goes first: 1; urge or worth): the larger goes first."""


class StagewisePolicy:
    """See the module. Never waits while anything is queued.

    Args:
        costs: of batches, as they are learnt.
        patience: exponent of the response ratio.
    """

    def __init__(self, costs: CostTable, patience: float = 1.5) -> None:
        self._costs = costs
        self._patience = patience
        self._shares, self._kinds = Shares(), Shares()
        self._waited: set[str] = set()  # the kinds that waited when the last batch was chosen

    def charge(self, work: Work, seconds: float) -> None:
        """Note what a request's work has cost the device."""
        self._shares.charge(work.account, seconds)
        self._kinds.charge(_kind(work), seconds)

    def choose(self, stations: Stations, now: float) -> Choice | None:
        """Return the next batch, or None where every queue is empty."""
        busy = [station for station in stations if station.tickets]
        waiting = sum(len(station.tickets) for station in busy)
        works = [ticket.request.work for station in busy for ticket in station.tickets]
        weights = self._shares.weights({work.account for work in works})
        kinds = {_kind(work) for work in works}
        if "film" in kinds - self._waited:
            self._kinds.forgo("film", "picture")
        self._waited = kinds
        first = self._kinds.least_served(kinds)
        best: tuple[Rank, Choice] | None = None
        coming = 0  # a picture meets the stations in this order, so these may come to this one too
        for station in busy:
            pictures = sum(isinstance(ticket, Picture) for ticket in station.tickets)
            coming += pictures
            graded = sorted(
                ((self._grade(ticket, weights, first, now), ticket) for ticket in station.tickets), key=_first
            )
            offer = self._offer(station, graded, coming if pictures else len(graded), waiting)
            if best is None or offer[0] > best[0]:
                best = offer
        return None if best is None else _previews_before(best[1], stations)

    def _offer(
        self, station: Station, graded: Sequence[tuple[Rank, Ticket]], coming: int, waiting: int
    ) -> tuple[Rank, Choice]:
        """Return a station's best batch and its rank. ``coming``: tickets that are at the station or may come to it."""
        key, costs = station.key, self._costs
        units = _units(graded) if key.kind == "encode" else [[pair] for pair in graded]
        rows = [1 if key.kind == "encode" else unit[0][1].rows for unit in units]
        coming = len(units) if key.kind == "encode" else coming
        quickest = min(costs.hoped(key, width) / min(width, max(coming * rows[0], 1)) for width in costs.widths(key))
        offers = costs.offers(key, rows)
        if graded[0][1].request.work.film and self._kinds.used("picture") > _ABOUT:
            offers = [offer for offer in offers if offer[1] <= _LONGEST] or offers[:1]
        worths, urges, place = list[float](), 0.0, 0
        for count, seconds in offers:
            for unit in units[place:count]:
                urges += sum(urge for (_, urge), _ in unit)
            place = count
            wasted = max(seconds - quickest * sum(rows[:count]), 0.0)
            worths.append(urges * offers[0][1] / max(seconds + wasted * waiting, 1e-9))
        best = max(range(len(offers)), key=worths.__getitem__)
        count = offers[best][0]
        chosen = [ticket for unit in units[:count] for _, ticket in unit]
        return (graded[0][0][0], worths[best]), Choice(station, chosen)

    def _grade(self, ticket: Ticket, weights: dict[str, float], first: str, now: float) -> Rank:
        """Return whether a ticket goes before others whatever they are worth, and its urge: its part in a worth.

        Args:
            first: the kind that the device has worked less on of late.
        """
        work = max(ticket.remaining_seconds, _LEAST_WORK)
        request = ticket.request.work
        urgent = request.deadline - now < _URGENT * work and isinstance(ticket, Picture)
        ratio = (max(now - request.arrived, 0.0) + work) / work
        return 2 * urgent + (_kind(request) == first), weights[request.account] * ratio**self._patience


def _first(pair: tuple[Rank, Ticket]) -> tuple[int, float]:
    (before, urge), _ = pair
    return -before, -urge


def _kind(work: Work) -> str:
    return "film" if work.film else "picture"


def _units(graded: Sequence[tuple[Rank, Ticket]]) -> list[list[tuple[Rank, Ticket]]]:
    """Put a request's pictures together: they share one text, so none of them stays behind."""
    found = dict[Request, list[tuple[Rank, Ticket]]]()
    for pair in graded:
        found.setdefault(pair[1].request, []).append(pair)
    return list(found.values())


def _previews_before(choice: Choice, stations: Stations) -> Choice:
    """Show a picture before it goes on: where a batch is chosen for its sake, or would finish it."""
    last = choice.station.key.kind == "decode"
    pictures = set(choice.tickets if last else choice.tickets[:1])
    for station in stations:
        previews = [t for t in station.tickets if isinstance(t, Preview) and t.picture in pictures]
        if previews and station is not choice.station:
            return Choice(station, previews[:1])
    return choice
