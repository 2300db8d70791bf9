"""An engine without a device: the scheduler's loop on a clock that only moves while batches run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rmd.cascade import Cascade
from rmd.presets import preset
from rmd.size import Size
from server.core.card import ModelCard, Schedule
from server.core.costs import CostTable
from server.core.loop import Batch, Loop
from server.core.messages import Lost, Message
from server.core.policies import Hold, make_policy
from server.core.stations import STUDENT, TEACHER, StationKey
from server.core.tickets import Picture, Preview
from server.core.work import Work

LOW_SIZE, FULL_SIZE = Size(128, 128), Size(256, 256)
ENCODE = StationKey("encode")
LOW, HIGH = StationKey("denoise", size=LOW_SIZE), StationKey("denoise", size=FULL_SIZE)
GUIDED = StationKey("denoise", TEACHER, FULL_SIZE)
DECODE, SHOW = StationKey("decode", size=FULL_SIZE), StationKey("decode", size=LOW_SIZE)

_GUIDANCE = Cascade.from_steps("teacher", (999, 800, 600, 400, 300, 200), [FULL_SIZE] * 6, guidance_scale=3.0)
SCHEDULES = {
    **{name: Schedule(name, preset("embedded", schedule=name), STUDENT) for name in ("2+2", "0+4", "1+3")},
    "teacher": Schedule("teacher", _GUIDANCE, TEACHER),
}
CARD = ModelCard("m", 0, "image", 16, SCHEDULES, "2+2", {"128x128": 64, "256x256": 256})

WIDE, NARROW = {1: 0.1, 2: 0.105, 4: 0.11, 8: 0.12}, {1: 0.1, 2: 0.2, 4: 0.4}
COSTS = {ENCODE: WIDE, LOW: WIDE, HIGH: NARROW, GUIDED: NARROW, DECODE: WIDE, SHOW: WIDE}


class Desk:
    """Hands requests to a loop, runs its batches, and keeps what is said and made.

    Args:
        costs: of batches: what the loop believes at first, and what they really take unless told otherwise.
        policy: see `make_policy`.
        film_seconds: see `Loop`.
    """

    def __init__(
        self,
        costs: Mapping[StationKey, Mapping[int, float]] = COSTS,
        policy: str = "stagewise",
        film_seconds: float = 3600.0,
    ) -> None:
        self.now = 0.0
        self.costs, self.truth = CostTable(costs), CostTable(costs)
        self.said: list[Message] = []
        self.batches: list[Batch] = []
        self.made: list[str] = []
        """Requests, in the order in which they were complete."""
        self.pixels: Counter[tuple[str, int, int]] = Counter()
        """(request, picture, partial number or -1): how often it was made."""
        self.loop = Loop([CARD], self.costs, make_policy(policy, self.costs), self.said.append, film_seconds)

    def submit(self, name: str, schedule: str = "2+2", n: int = 1, **changes: Any) -> Work:
        """Hand over a request that arrives now."""
        fields = {"arrived": self.now, "deadline": math.inf, **changes}
        work = Work(id=name, prompt=name, schedule=schedule, seeds=tuple(range(n)), **fields)
        self.loop.submit(work, self.now)
        return work

    def begin(self) -> Batch:
        """Take the next batch."""
        batch = self.loop.next_batch(self.now)
        assert isinstance(batch, Batch), batch
        self.batches.append(batch)
        return batch

    def end(self, batch: Batch) -> None:
        """Let a batch run as a device would."""
        seconds = self.truth.seconds(batch.key, batch.rows)
        self.now += seconds
        shown: dict[Picture, Any] = {}
        for picture in batch.pictures:
            if batch.key.kind == "encode":
                picture.request.conditioning = {}
            elif batch.key.kind == "denoise" and picture.preview_due:
                shown[picture] = "x0"
        present = [ticket for ticket in batch.tickets if not ticket.request.over]
        self.loop.ended(batch, seconds, self.now, shown, batch.rows)
        if batch.key.kind != "decode":
            return
        for ticket in present:
            picture, number = (ticket.picture, ticket.number) if isinstance(ticket, Preview) else (ticket, -1)
            assert isinstance(picture, Picture)
            self.pixels[ticket.request.work.id, picture.index, number] += 1
            if ticket.request.over and ticket.request.work.id not in self.made:
                self.made.append(ticket.request.work.id)

    def step(self) -> Batch:
        """Run one batch."""
        batch = self.begin()
        self.end(batch)
        return batch

    def run(self) -> None:
        """Run until nothing waits."""
        while (batch := self.loop.next_batch(self.now)) is not None:
            if isinstance(batch, Hold):
                assert batch.until > self.now
                self.now = batch.until
                continue
            self.batches.append(batch)
            self.end(batch)

    def until(self, key: StationKey) -> Batch:
        """Run batches until one of this station begins, and return it."""
        while (batch := self.begin()).key != key:
            self.end(batch)
        return batch

    def lost(self) -> dict[str, str]:
        """Why requests ended early, by name."""
        return {message.id: message.why for message in self.said if isinstance(message, Lost)}


def names(batch: Batch) -> list[str]:
    """Whose tickets a batch holds."""
    return [ticket.request.work.id for ticket in batch.tickets]
