"""What a live run asks of an engine, and one of the same manners without a device, for rehearsals in no time."""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

from bench.serving.tables import Machine
from server.core.costs import CostTable
from server.core.loop import Batch, Loop
from server.core.messages import Command, Encoded, Message, Pixels, Ready, Submit, UsePolicy
from server.core.policies import Hold, make_policy
from server.core.tickets import Picture, Preview

Received = tuple[Message, memoryview | None]


class Link(Protocol):
    """A running engine; `server.front.engine.EngineProcess` is one."""

    def send(self, command: Command) -> None:
        """Give the engine something to do."""

    def receive(self, timeout: float = 0.0) -> Received | None:
        """Return the next message, and the pixels that came with it; None after ``timeout`` seconds."""

    def stop(self, timeout: float = 5.0) -> None:
        """Let it end after the batch that runs."""


class PretendedEngine:
    """The engine's loop in this process; batches take the table's seconds, on a clock of its own, and make nothing.

    Args:
        machine: its card and costs.
    """

    def __init__(self, machine: Machine) -> None:
        self._now = 0.0
        self._costs, self._truth = CostTable(machine.costs), CostTable(machine.costs)
        self._messages: deque[Message] = deque()
        self._loop = Loop([machine.card], self._costs, make_policy("stagewise", self._costs), self._messages.append)
        self._batch: Batch | None = None
        self._ends = self._held = math.inf
        table = tuple((key, w, s) for key, widths in machine.costs.items() for w, s in widths.items())
        self._messages.append(Ready((machine.card,), table))

    def clock(self) -> float:
        """Return its time, which passes while somebody waits for a message."""
        return self._now

    def send(self, command: Command) -> None:
        """Heed a command."""
        if isinstance(command, Submit):
            self._loop.submit(command.work, self._now)
        elif isinstance(command, UsePolicy):
            self._loop.policy = make_policy(command.policy, self._costs)

    def receive(self, timeout: float = 0.0) -> Received | None:
        """Let time pass until there is a message."""
        until = self._now + timeout
        self._work(self._now)
        while not self._messages and self._now < until:
            self._now = min(until, self._ends if self._batch else self._held)
            self._work(self._now)
        return (self._messages.popleft(), None) if self._messages else None

    def stop(self, timeout: float = 5.0) -> None:
        """Nothing is left running."""

    def _work(self, now: float) -> None:
        if self._batch is not None and now >= self._ends:
            self._finish(self._batch, now)
            self._batch = None
        if self._batch is None:
            batch = self._loop.next_batch(now)
            self._held = batch.until if isinstance(batch, Hold) else math.inf
            if batch is not None and not isinstance(batch, Hold):
                self._batch = batch
                self._ends = now + self._truth.seconds(batch.key, batch.rows)

    def _finish(self, batch: Batch, now: float) -> None:
        if batch.key.kind == "encode":
            for request in {id(picture.request): picture.request for picture in batch.pictures}.values():
                request.conditioning = True
                self._messages.append(Encoded(request.work.id, 0, 0))
        shown: dict[Picture, object] = {}
        if batch.key.kind == "denoise":
            shown = {picture: True for picture in batch.pictures if picture.preview_due}
        seconds = self._truth.seconds(batch.key, batch.rows)
        self._loop.ended(batch, seconds, now, shown, batch.rows)
        if batch.key.kind == "decode":
            for ticket in batch.tickets:
                picture, number = (ticket.picture, ticket.number) if isinstance(ticket, Preview) else (ticket, -1)
                assert isinstance(picture, Picture)
                self._messages.append(Pixels(ticket.request.work.id, picture.index, (1,), "", number))
