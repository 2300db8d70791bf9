"""A cluster on the virtual clock: whole replicas, or stages apart, each pool with devices of its own.

A device of a pool runs the server's own loop and policy over the pool's stations alone. What its batch sends to a
station of another pool is handed to that pool's device which will have finished it first, and is there after a delay
and its bytes over the link's bandwidth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from bench.serving.outcomes import Run
from bench.serving.simulate import Device, PolicyMaker, Simulation, World
from bench.serving.tables import Machine
from bench.serving.traces import MIXES, Ask, Mix
from rmd.size import Size
from server.core.card import ModelCard, Schedule
from server.core.costs import CostTable
from server.core.loop import Batch
from server.core.stations import StationKey
from server.core.tickets import Picture, Ticket

Stage = Literal["text", "low", "high", "decode"]
Layout = tuple[tuple[Stage, ...], ...]
"""The stages of each pool, in the order a picture meets them."""

STAGES: tuple[Stage, ...] = ("text", "low", "high", "decode")
LAYOUTS: Mapping[str, Layout] = {
    "whole": (STAGES,),
    "decode apart": (("text", "low", "high"), ("decode",)),
    "low, high": (("text", "low"), ("high", "decode")),
    "low, high, decode": (("text", "low"), ("high",), ("decode",)),
    "text apart": (("text",), ("low", "high", "decode")),
}


@dataclass(frozen=True)
class Link:
    """What lies between two pools. Each message travels alone: no other takes of its bandwidth.

    Attributes:
        bytes_per_second: bandwidth.
        seconds: of each message beside that.
        latents: bytes of a picture's latents, by the size of the station that they go to.
        text: bytes of an encoded prompt, which goes to denoising stations with each picture.
    """

    bytes_per_second: float = 25e9
    seconds: float = 0.2e-3
    latents: Mapping[Size, int] = field(default_factory=dict)
    text: int = 0

    def travel(self, tickets: Sequence[Ticket]) -> float:
        """Return the seconds of one message with these tickets."""
        return self.seconds + sum(map(self._bytes, tickets)) / self.bytes_per_second

    def _bytes(self, ticket: Ticket) -> int:
        key = ticket.station()
        begun = not (isinstance(ticket, Picture) and ticket.step == 0)  # before its first step it is but a seed
        latents = self.latents.get(key.size, 0) if key.size is not None and begun else 0
        return latents + (self.text if key.kind == "denoise" else 0)


def stage_of(key: StationKey, full: Size) -> Stage:
    """Return the stage that a station belongs to: denoising at the full side is high, below it low."""
    if key.kind == "denoise":
        return "high" if key.size == full else "low"
    return "text" if key.kind == "encode" else "decode"


class Cluster(Simulation):
    """One run of a cluster.

    Args:
        layout: the pools' stages; their order is the devices'.
        devices: of each pool.
        world: its own number of devices counts for nothing.

    Raises:
        ValueError: a pool without a device, or a stage without a pool, that some request of the trace needs; or a
            stage in two pools.
    """

    def __init__(
        self,
        machine: Machine,
        policy: str | PolicyMaker,
        trace: Sequence[Ask],
        layout: Layout,
        devices: Sequence[int],
        link: Link = Link(),
        world: World = World(),
        clients: int | None = None,
    ) -> None:
        self._schedules = machine.card.schedules
        _check(layout, devices, {stage for ask in trace for stage in _stages(self._schedules[ask.schedule])})
        super().__init__(machine, policy, trace, replace(world, devices=sum(devices)), clients)
        self._link, self._layout = link, layout
        self._pools: list[Sequence[Device]] = []
        for count in devices:
            begin = sum(map(len, self._pools))
            self._pools.append(self._devices[begin : begin + count])
        self._full = _full_size(machine.card)
        self._costs = CostTable(machine.costs)
        self._parts: dict[tuple[str, int], float] = {}
        self._pool_of = {stage: index for index, pool in enumerate(layout) for stage in pool}
        self._of_device = {id(device): index for index, pool in enumerate(self._pools) for device in pool}

    def _entrance(self) -> Sequence[Device]:
        return self._pools[self._pool_of["text"]]

    def _cost(self, ask: Ask, device: Device) -> float:
        if len(self._layout) == 1:
            return super()._cost(ask, device)
        device.backlog += ask.pictures * self._part(ask.schedule, self._pool_of["text"])
        return 0.0  # from here on by the batches that have run

    def _part(self, schedule: str, pool: int) -> float:
        """A picture's seconds in a pool, in the best company."""
        if (schedule, pool) not in self._parts:
            seconds = stage_seconds(self._costs, self._schedules[schedule])
            self._parts[schedule, pool] = sum(seconds[stage] for stage in self._layout[pool])
        return self._parts[schedule, pool]

    def _end(self, device: Device, batch: Batch, seconds: float) -> None:
        super()._end(device, batch, seconds)
        if len(self._layout) == 1:
            return
        for ticket in batch.tickets:
            rows = ticket.rows if batch.key.kind == "denoise" else 1
            device.backlog -= self._costs.shared(batch.key, rows)
        self._hand_on(device)

    def _hand_on(self, device: Device) -> None:
        """Send what has come to stations of other pools on its way."""
        parcels: dict[int, tuple[Device, list[Ticket]]] = {}
        for station in device.loop.stations:
            pool = self._pool_of[stage_of(station.key, self._full)] if station.tickets else None
            if pool is None or pool == self._of_device[id(device)]:
                continue
            for ticket in station.tickets:
                goal = self._quickest(self._pools[pool])
                preview = self._costs.shared(station.key, 1)
                goal.backlog += (
                    self._part(ticket.request.work.schedule, pool) if isinstance(ticket, Picture) else preview
                )
                parcels.setdefault(id(goal), (goal, []))[1].append(ticket)
            device.loop.stations.take(station, station.tickets)
        for goal, tickets in parcels.values():
            self._push(self._now + self._link.travel(tickets), 2, partial(self._receive, goal, tickets))

    def _receive(self, device: Device, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            device.loop.stations.join(ticket.station(), ticket, self._now)
        self._turn(device)


def simulate_cluster(
    machine: Machine,
    policy: str | PolicyMaker,
    trace: Sequence[Ask],
    layout: Layout,
    devices: Sequence[int],
    link: Link = Link(),
    world: World = World(),
    clients: int | None = None,
) -> Run:
    """Play a trace; see :class:`Cluster`."""
    return Cluster(machine, policy, trace, layout, devices, link, world, clients).run()


def stage_seconds(costs: CostTable, schedule: Schedule) -> dict[Stage, float]:
    """Return the seconds of one picture at each stage, in the company that serves most a second."""
    cascade, found = schedule.cascade, dict.fromkeys(STAGES, 0.0)
    rows = 2 if schedule.guided else 1
    found["text"] = costs.shared(StationKey("encode"), 1)
    for step in cascade.steps:
        key = StationKey("denoise", schedule.lane, step.size)
        found[stage_of(key, cascade.full_size)] += costs.shared(key, rows)
    found["decode"] = costs.shared(StationKey("decode", size=cascade.full_size), 1)
    return found


def pool_seconds(machine: Machine, mix: str, layout: Layout) -> list[float]:
    """Return the seconds of a mix's mean picture in each pool, in the best company; partial pictures left out."""
    chosen, costs = MIXES[mix], CostTable(machine.costs)
    return [sum(_mean(machine, chosen, costs)[stage] for stage in pool) for pool in layout]


def most(seconds: Sequence[float], devices: Sequence[int]) -> float:
    """Return the pictures a second that pools can make at most: the slowest one's devices over its seconds."""
    return min(count / part for count, part in zip(devices, seconds, strict=True) if part > 0)


def best_ratio(seconds: Sequence[float], devices: int) -> tuple[int, ...]:
    """Return the devices of each pool by which :func:`most` is largest: each next one goes to the slowest pool.

    Raises:
        ValueError: fewer devices than pools.
    """
    if devices < len(seconds):
        raise ValueError(f"{devices} devices for {len(seconds)} pools: each pool needs one")
    counts = [1] * len(seconds)
    for _ in range(devices - len(seconds)):
        slowest = min(range(len(counts)), key=lambda pool: counts[pool] / max(seconds[pool], 1e-12))
        counts[slowest] += 1
    return tuple(counts)


def one_off(devices: Sequence[int]) -> list[tuple[int, ...]]:
    """Return every ratio that is one device off, no pool empty."""
    found = []
    for source, count in enumerate(devices):
        for goal in range(len(devices)):
            if goal != source and count > 1:
                moved = list(devices)
                moved[source], moved[goal] = moved[source] - 1, moved[goal] + 1
                found.append(tuple(moved))
    return found


def _mean(machine: Machine, mix: Mix, costs: CostTable) -> dict[Stage, float]:
    mean = dict.fromkeys(STAGES, 0.0)
    for name, share in mix.schedules.items():
        for stage, seconds in stage_seconds(costs, machine.card.schedules[name]).items():
            mean[stage] += share * seconds / (mix.pictures if stage == "text" else 1.0)
    return mean


def _full_size(card: ModelCard) -> Size:
    return card.sizes[-1]


def _stages(schedule: Schedule) -> set[Stage]:
    cascade = schedule.cascade
    denoise = (StationKey("denoise", schedule.lane, step.size) for step in cascade.steps)
    return {"text", "decode", *(stage_of(key, cascade.full_size) for key in denoise)}


def _check(layout: Layout, devices: Sequence[int], needed: set[Stage]) -> None:
    if len(layout) != len(devices):
        raise ValueError(f"{len(layout)} pools, and numbers of devices for {len(devices)}: give one a pool")
    for stage in STAGES:
        counts = [count for pool, count in zip(layout, devices, strict=True) if stage in pool]
        if len(counts) > 1:
            raise ValueError(f"stage '{stage}' is in {len(counts)} pools: leave it in one")
        if stage in needed and not counts:
            raise ValueError(f"no pool has stage '{stage}', which the requests need: add it to one")
        if stage in needed and counts[0] < 1:
            raise ValueError(f"the pool of stage '{stage}' has no device, and the requests need it: give it one")
