"""Which engine makes what: each picture goes to the one that will have finished its part first."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence

from msgspec import structs

from rmd.cascade import Cascade
from server.core.messages import Cancel, Command, Submit
from server.core.stages import Stage, Stages, costs_in, stage_at
from server.front.generation import Generation, Place
from server.front.ledger import Ledger
from server.front.member import Health, Member
from server.front.members import Members


class Placing:
    """See the module. What changes anything is called with the ledger's lock held.

    Attributes:
        outbox: what is to be sent to engines.
    """

    def __init__(self, members: Members, ledger: Ledger) -> None:
        self._members, self._ledger = members, ledger
        self.outbox: deque[tuple[Member, Command]] = deque()

    def place(self, generation: Generation) -> None:
        """Give away what no engine has of a request; nothing where none is ready that can do it.

        Pictures that begin go together. Each that was handed over goes alone, and each partial one.
        """
        work, cascade = generation.work, generation.spec.cascade
        nobodys = [i for i, p in enumerate(generation.places) if p.engine is None and not (p.decoded or p.left)]
        begin = [i for i in nobodys if generation.places[i].state is None]
        everyone = range(len(generation.places))
        if begin:
            others = tuple(i for i in everyone if i not in begin)
            wanted = Submit(work if others == work.done else structs.replace(work, done=others))
            self._give(generation, stage_at(cascade, 0), [generation.places[i] for i in begin], wanted)
        onward = [generation.places[i] for i in nobodys if i not in begin]
        for place in (*onward, *(shown for shown in generation.previews.values() if shown.engine is None)):
            state = place.state
            assert state is not None
            wanted = Submit(structs.replace(work, done=tuple(everyone)), (state,))
            self._give(generation, "decode" if state.number >= 0 else stage_at(cascade, state.step), [place], wanted)

    def _give(self, generation: Generation, stage: Stage, places: Sequence[Place], wanted: Submit) -> None:
        model, ledger = generation.work.model, self._ledger
        able = [
            member
            for member in self._members
            if member.health is Health.READY and stage in member.stages and model in member.cards
        ]
        if not able:
            return

        def before(member: Member) -> float:
            own = generation.remaining(places[0], member.stages)
            return member.foreign + ledger.work_before(own, member.index, member.stages)

        member = min(able, key=before) if able[1:] else able[0]
        elsewhere = self._elsewhere(generation, stage, places, member)
        for place in places:
            place.engine = member.index
        self.outbox.append((member, structs.replace(wanted, sent=time.monotonic(), elsewhere=elsewhere)))

    def _elsewhere(self, generation: Generation, stage: Stage, places: Sequence[Place], member: Member) -> Stages:
        """Return the later stages of an engine's that another one, which cannot do this stage, is free for sooner.

        Without these, engines that have some of the stages beside others that have all would never be given anything.
        """
        others = [
            each
            for each in self._members
            if each.health is Health.READY and stage not in each.stages and generation.work.model in each.cards
        ]
        if not others:
            return frozenset()

        def busy(one: Member) -> float:
            return one.foreign + self._ledger.work_before(math.inf, one.index, one.stages)

        until = busy(member) + (len(places) - 1) * generation.remaining(places[0], member.stages)
        free = [each.stages for each in others if busy(each) < until]
        return (member.stages & frozenset[Stage]().union(*free)) - {stage}

    def forget(self, generation: Generation) -> None:
        """A request has ended early: nobody is to make it any longer."""
        having = {place.engine for place in (*generation.places, *generation.previews.values())}
        self.outbox.extend((member, Cancel(generation.id)) for member in self._members if member.index in having)

    def work(self) -> dict[str, float]:
        """See :meth:`server.front.fleet.Fleet.work`."""
        before = self._ledger.work_before
        work = {member.device: before(math.inf, member.index, member.stages) for member in self._members}
        return {"": before(math.inf) - sum(work.values()), **work}

    def backlog(self, costs: tuple[float, ...], cascade: Cascade) -> float:
        """Return the seconds of work that go before a newcomer's, at the stage or stages where most do.

        Whoever needs more than it is passed.

        Args:
            costs: its own, see :func:`server.core.card.step_costs`.
            cascade: its own.
        """
        before = self._ledger.work_before
        return max(
            (before(costs_in(costs, cascade, stages)[0], stages=stages) + sum(member.foreign for member in members))
            / max(len(members), 1)
            for stages, members in self._members.pools
        )

    def share(self, costs: tuple[float, ...], cascade: Cascade) -> float:
        """Return what one such picture adds to that for those behind it."""
        return max(costs_in(costs, cascade, each)[0] / max(len(members), 1) for each, members in self._members.pools)
