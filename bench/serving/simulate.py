"""A trace on a virtual clock: the server's own Loop and policies, with a table in the device's place."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from bench.serving.outcomes import Batches, Outcome, Run
from bench.serving.tables import Costs, Machine
from bench.serving.traces import Ask
from server.core.admission import Admission, Permit
from server.core.costs import CostTable
from server.core.faults import RequestError
from server.core.loop import Batch, Loop
from server.core.messages import Ended, Lost, Message
from server.core.policies import Hold, Policy, make_policy
from server.core.policies.stagewise import StagewisePolicy
from server.core.stations import StationKey
from server.core.tickets import Picture, Preview
from server.core.tracks import ENTER_TRACKS, LEAVE_TRACKS, TrackCosts

PolicyMaker = Callable[[CostTable], Policy]


@dataclass(frozen=True)
class World:
    """What the simulated machine does beside what the policy believes.

    Attributes:
        devices: engines; a request goes where it will be finished first.
        tracks: batches at a time on a device while many wait, under the stage-wise rule alone, as the server has it.
        truth: what batches really cost; the machine's own table where None.
        noise: standard deviation of the logarithm of a batch's seconds over the truth's.
        batch_seconds: of the host between two batches, device idle.
        front_seconds: between a request's arrival and its place in a queue.
        queue_items: pictures admitted at once; None admits all.
        deadline_seconds: from arrival.
    """

    devices: int = 1
    tracks: int = 1
    truth: Costs | None = None
    noise: float = 0.0
    batch_seconds: float = 0.0
    front_seconds: float = 0.0
    queue_items: int | None = None
    deadline_seconds: float = math.inf
    seed: int = 0


@dataclass
class Device:
    """One engine: its loop, and the batches that run."""

    loop: Loop
    messages: list[Message] = field(default_factory=list)
    running: dict[int, float] = field(default_factory=dict)
    """Batch number -> when it will be over."""
    tracked: bool = False
    backlog: float = 0.0
    """Seconds of admitted work in the best company."""
    wake: float = math.inf


class Simulation:
    """One run.

    Args:
        machine: model and costs; the policy's table begins with these.
        policy: as `server.core.policies.make_policy` reads it, or what makes one.
        clients: None sends each request at its time; a number keeps that many on their way instead.
    """

    def __init__(
        self,
        machine: Machine,
        policy: str | PolicyMaker,
        trace: Sequence[Ask],
        world: World = World(),
        clients: int | None = None,
    ) -> None:
        self.world, self._machine = world, machine
        self._name = policy if isinstance(policy, str) else getattr(policy, "__name__", "policy")
        make = (lambda costs: make_policy(policy, costs)) if isinstance(policy, str) else policy
        self._truth = CostTable(world.truth if world.truth is not None else machine.costs)
        self._true: dict[tuple[StationKey, int], tuple[int, float]] = {}
        self._dice = random.Random(world.seed)
        self._devices = [self._device(make) for _ in range(world.devices)]
        self._now, self._last = 0.0, 0.0
        self._clock = lambda: self._now
        self._admission = Admission(world.queue_items or 2**60, 2**60, clock=self._clock)
        self._permits: dict[str, tuple[Permit, Device, float]] = {}
        self._left: dict[str, int] = {}
        self.outcomes: list[Outcome] = []
        self.batches = Batches()
        self._trace = iter(trace)
        self._closed = clients is not None
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._order = 0
        for ask in _first(self._trace, clients):
            self._push(0.0 if self._closed else ask.at, 1, partial(self._arrive, ask))

    def run(self) -> Run:
        """Play the trace to its end."""
        while self._events:
            self._now, _, _, happen = heapq.heappop(self._events)
            happen()
        return Run(self._name, self.outcomes, self.batches, self._last, self.world.devices)

    def _device(self, make: PolicyMaker) -> Device:
        costs = CostTable(self._machine.costs)
        seen = TrackCosts(costs)
        messages: list[Message] = []
        return Device(Loop([self._machine.card], costs, make(seen), messages.append, seen=seen), messages)

    def _push(self, at: float, rank: int, happen: Callable[[], None]) -> None:
        """At one time the lower rank goes first: batches end (0), requests arrive (1), devices look (2)."""
        self._order += 1
        heapq.heappush(self._events, (at, rank, self._order, happen))

    # -- requests ------------------------------------------------------------------------------------------------------

    def _arrive(self, ask: Ask) -> None:
        name, now = str(len(self.outcomes)), self._now
        outcome = Outcome(ask, now)
        self.outcomes.append(outcome)
        if not self._closed:
            for following in _first(self._trace, 0):
                self._push(following.at, 1, partial(self._arrive, following))
        try:
            permit = self._admission.acquire(ask.pictures, ask.pictures)
        except RequestError as error:
            self._settle(outcome, error.fault.value.status)
            return
        device = self._quickest(self._entrance())
        work = ask.work(name, now, now + self.world.deadline_seconds)
        device.loop.submit(work, now + self.world.front_seconds)
        cost = self._cost(ask, device)
        device.backlog += cost
        self._permits[name] = (permit, device, cost)
        self._left[name] = ask.pictures
        if not device.running or device.tracked:
            self._push(now + self.world.front_seconds, 2, partial(self._turn, device))

    def _entrance(self) -> Sequence[Device]:
        """The devices that a new request may be given to."""
        return self._devices

    def _quickest(self, devices: Sequence[Device]) -> Device:
        return min(devices, key=self._finish) if len(devices) > 1 else devices[0]

    def _cost(self, ask: Ask, device: Device) -> float:
        if len(self._devices) == 1:
            return 0.0
        from server.core.card import step_costs

        schedule = self._machine.card.schedules[ask.schedule]
        return ask.pictures * step_costs(device.loop.costs, schedule.cascade, schedule.lane, how="shared")[0]

    def _finish(self, device: Device) -> float:
        return device.backlog + max((over - self._now for over in device.running.values()), default=0.0)

    def _settle(self, outcome: Outcome, status: int) -> None:
        outcome.status, outcome.finished = status, self._now
        self._last = max(self._last, self._now)
        if self._closed:
            for following in _first(self._trace, 0):
                self._push(self._now, 1, partial(self._arrive, following))

    # -- devices -------------------------------------------------------------------------------------------------------

    def _over(self, device: Device, batch: Batch, seconds: float) -> None:
        """One of a device's batches is over."""
        self._end(device, batch, seconds)
        self._turn(device)

    def _turn(self, device: Device) -> None:
        """Something may be there for a device to do."""
        while self._has_room(device):
            tracks = self.world.tracks if device.tracked else 1
            batch = device.loop.next_batch(self._now, tracks)
            self._listen(device)
            if isinstance(batch, Hold):
                if batch.until < device.wake or device.wake <= self._now:
                    device.wake = batch.until
                    self._push(batch.until, 2, partial(self._turn, device))
                return
            if batch is None:
                return
            self._start(device, batch)

    def _has_room(self, device: Device) -> bool:
        """Whether another batch may begin, as `server.device.engine` has it: tracks are left when all are idle."""
        if not device.running:
            many = self.world.tracks > 1 and isinstance(device.loop.policy, StagewisePolicy)
            device.tracked = many and device.loop.crowded(ENTER_TRACKS)
            return True
        return device.tracked and len(device.running) < self.world.tracks and device.loop.crowded(LEAVE_TRACKS)

    def _start(self, device: Device, batch: Batch) -> None:
        width, seconds = self._cost_of(batch.key, batch.rows * batch.tracks)
        if self.world.noise:
            seconds *= self._dice.lognormvariate(-(self.world.noise**2) / 2, self.world.noise)
        self.batches.add(batch.key, batch.rows, width // batch.tracks, seconds / batch.tracks)
        if self.world.batch_seconds:
            self.batches.gaps.append(self.world.batch_seconds)
        over = device.running[batch.number] = self._now + seconds + self.world.batch_seconds
        self._push(over, 0, partial(self._over, device, batch, seconds))

    def _cost_of(self, key: StationKey, rows: int) -> tuple[int, float]:
        known = self._true.get((key, rows))
        if known is None:
            width = next((w for w in self._truth.widths(key) if w >= rows), rows)
            known = self._true[key, rows] = (width, self._truth.seconds(key, rows))
        return known

    def _end(self, device: Device, batch: Batch, seconds: float) -> None:
        del device.running[batch.number]
        shown: dict[Picture, None] = {}
        if batch.key.kind == "encode":
            for ticket in batch.tickets:
                ticket.request.conditioning = True
        for ticket in batch.tickets:
            if isinstance(ticket, Preview):
                outcome = self.outcomes[int(ticket.request.work.id)]
                if math.isnan(outcome.first_partial):
                    outcome.first_partial = self._now
            elif batch.key.kind == "denoise" and isinstance(ticket, Picture) and ticket.preview_due:
                shown[ticket] = None
        gap = 0.0 if batch.tracks > 1 else self.world.batch_seconds
        device.loop.ended(batch, seconds, self._now, shown, batch.rows, gap)
        self._listen(device)

    def _listen(self, device: Device) -> None:
        for message in device.messages:
            if isinstance(message, Ended):
                for moved in message.moved:
                    if moved.station is None:
                        self._picture_left(moved.id)
            elif isinstance(message, Lost):
                self._give_back(message.id, finished=False)
                self._settle(self.outcomes[int(message.id)], 504 if message.why == "late" else 500)
        device.messages.clear()

    def _picture_left(self, name: str) -> None:
        if name not in self._left:
            return
        self._left[name] -= 1
        self._permits[name][0].leave(finished=True)
        if not self._left[name]:
            self._give_back(name, finished=True)
            self._settle(self.outcomes[int(name)], 200)

    def _give_back(self, name: str, finished: bool) -> None:
        permit, device, cost = self._permits.pop(name)
        del self._left[name]
        permit.release(finished)
        device.backlog -= cost


def simulate(
    machine: Machine,
    policy: str | PolicyMaker,
    trace: Sequence[Ask],
    world: World = World(),
    clients: int | None = None,
) -> Run:
    """Play a trace; see :class:`Simulation`."""
    return Simulation(machine, policy, trace, world, clients).run()


def _first(trace: Iterator[Ask], count: int | None) -> Iterator[Ask]:
    """The next ``count`` requests; the next one where that is 0 or None."""
    for _ in range(count or 1):
        ask = next(trace, None)
        if ask is None:
            return
        yield ask
