"""The engines that a front knows: those it starts itself, or those that others start and name to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import overload

from server.core.card import ModelCard
from server.core.costs import CostTable, JoinedCosts
from server.core.stages import ALL, SETS, Stage, Stages
from server.front.engine import EngineLink
from server.front.member import Health, Member, WatchLimits

Starts = Sequence[tuple[str, Callable[[], EngineLink]]]


class Members(Sequence[Member]):
    """See the module. May be looked at by any thread; changed with the fleet's lock held.

    Args:
        starts: by device, what starts an engine on it; none where engines are enlisted.
        limits: when an engine counts as hung.
    """

    def __init__(self, starts: Starts, limits: WatchLimits) -> None:
        self._limits = limits
        self._members = [Member(i, device, start, limits) for i, (device, start) in enumerate(starts)]
        self._listed: Mapping[str, Callable[[], EngineLink]] | None = None if starts else {}
        self._numbers = itertools.count(len(starts))

    @overload
    def __getitem__(self, position: int) -> Member: ...

    @overload
    def __getitem__(self, position: slice) -> Sequence[Member]: ...

    def __getitem__(self, position: int | slice) -> Member | Sequence[Member]:
        """One of those that are there, or several."""
        return self._members[position]

    def __len__(self) -> int:
        """How many there are."""
        return len(self._members)

    @property
    def lead(self) -> Member | None:
        """The first that is ready, or else was."""
        known = [member for member in self._members if member.cards]
        return next((member for member in known if member.health is Health.READY), known[0] if known else None)

    @property
    def costs(self) -> CostTable:
        """What batches cost: as the lead knows, or where stages are apart, the first engine that has a station."""
        lead, ordered = self.lead, sorted(self._members, key=lambda member: member.health is not Health.READY)
        if lead is None or lead.stages == ALL:
            return CostTable({}) if lead is None else lead.costs
        return JoinedCosts([lead.costs, *(member.costs for member in ordered)])

    @property
    def cards(self) -> dict[str, ModelCard]:
        """The models that engines hold, by place, in the order of the checkpoints; as the lead knows them.

        Each has an engine at every stage that any model has one at: what some engine could not load ends nowhere.
        """
        lead, found, knowing = self.lead, dict[str, ModelCard](), [member for member in self._members if member.cards]
        for member in [*([lead] if lead else []), *knowing]:
            apart = {} if member.stages == ALL else {place: found[place] for place in member.cards if place in found}
            joined = {place: card.joined(member.cards[place]) for place, card in apart.items()}
            found = {**member.cards, **found, **joined}
        stages = _stages_of(knowing)
        return {
            place: card
            for place, card in found.items()
            if _stages_of(member for member in knowing if place in member.cards) == stages
        }

    @property
    def lacking(self) -> Stages:
        """The stages that no engine does now."""
        return ALL.difference(*(member.stages for member in self._members if member.health is Health.READY))

    @property
    def known(self) -> bool:
        """Whether each stage has an engine that is ready, or was."""
        return not ALL.difference(*(member.stages for member in self._members if member.cards))

    @property
    def pools(self) -> Sequence[tuple[Stages, Sequence[Member]]]:
        """Sets of stages, and the engines that may work at any of them: their work takes at least its share of these.

        Every set counts: that which takes longest says when work is done.
        """
        alive = [member for member in self._members if member.health is not Health.DEAD]
        sets = [ALL] if all(member.stages == ALL for member in alive) else SETS
        return [(stages, [member for member in alive if member.stages & stages]) for stages in sets]

    @property
    def all_dead(self) -> str | None:
        """Why no engine is left nor will come for some stage, or no model has one at each; else None."""
        if self.known and not self.cards:
            reasons = {name: why for member in self._members for name, why in member.missing.items()}
            told = "; ".join(f"{name}: {why}" for name, why in reasons.items())
            return f"no checkpoint could be loaded by an engine of every stage: {told}"
        if self._listed is not None:
            return None
        for stage in sorted(ALL):
            able = [member for member in self._members if stage in member.stages]
            if all(member.health is Health.DEAD for member in able):
                return next((member.reason for member in able), "no engine has its stage")
        return None

    def enlist(self, engines: Mapping[str, Callable[[], EngineLink]], foreign: Mapping[str, float]) -> None:
        """See :meth:`server.front.fleet.Fleet.enlist`."""
        self._listed = engines
        known = {member.device for member in self._members}
        new = [
            Member(next(self._numbers), name, start, self._limits, enlisted=True)
            for name, start in engines.items()
            if name not in known
        ]
        self._members = [*self._members, *new]  # another list: whoever looks at the old one goes on
        for member in self._members:
            member.start_link = engines.get(member.device, member.start_link)  # keys may have changed
            member.foreign = foreign.get(member.device, 0.0)

    def named(self, member: Member) -> bool:
        """Whether an engine may be there to be found, or to be started."""
        return self._listed is None or member.device in self._listed

    def forget_gone(self) -> None:
        """Forget those that have ended and are not named any more.

        But not the last that knew a stage: until another one has loaded, what is served and what it costs is known from
        it, and requests wait.
        """
        here = [each for each in self._members if each.link is not None or self.named(each)]
        known = _stages_of(each for each in here if each.cards)
        kept = list[Member]()
        for gone in reversed([each for each in self._members if each not in here and each.cards]):
            if gone.stages - known:
                kept.append(gone)
                known |= gone.stages
        if len(here) + len(kept) < len(self._members):
            self._members = [each for each in self._members if each in here or each in kept]


def _stages_of(members: Iterable[Member]) -> Stages:
    return frozenset[Stage]().union(*(member.stages for member in members))
