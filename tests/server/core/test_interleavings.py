"""Whatever happens in whatever order, every picture ends exactly once and nothing stays behind."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from server.core.loop import Batch
from server.core.messages import Began, Ended, Lost
from server.core.policies import Hold
from server.core.tickets import Preview
from tests.server.core.desk import Desk

_NAMES = st.integers(0, 7).map(str)
_REQUEST = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(["2+2", "0+4", "1+3", "teacher"]),
        "n": st.integers(1, 3),
        "partial_images": st.integers(0, 3),
        "deadline": st.sampled_from([0.5, 3.0, float("inf")]),
        "alone": st.booleans(),
        "account": st.sampled_from(["", "a", "b"]),
        "frames_per_second": st.sampled_from([None, None, 16]),
    }
)
_EVENT = st.one_of(
    st.tuples(st.just("submit"), _NAMES, _REQUEST),
    st.tuples(st.just("cancel"), _NAMES, st.none()),
    st.tuples(st.just("wait"), st.none(), st.sampled_from([0.01, 0.4, 2.0])),
    st.tuples(st.just("begin"), st.none(), st.none()),
    st.tuples(st.just("end"), st.none(), st.sampled_from(["fine", "fine", "fine", "passes", "stays"])),
)


class Ledger(Desk):
    """Knows what was asked for, and how it ended."""

    def __init__(self, policy: str) -> None:
        super().__init__(policy=policy, film_seconds=3.0)
        self.asked: dict[str, int] = {}
        self.cancelled: set[str] = set()
        self.running: Batch | None = None

    def handle(self, what: str, name: str | None, how: Any) -> None:
        if what == "submit" and name is not None and name not in self.asked:
            changes = dict(how)
            self.asked[name] = changes["n"]
            self.submit(name, **{**changes, "deadline": self.now + changes["deadline"]})
        elif what == "cancel" and name in self.asked and name not in self.made and name not in self.lost():
            self.cancelled.add(name)
            self.loop.cancel(name)
        elif what == "wait":
            self.now += how
        elif what == "begin" and self.running is None:
            batch = self.loop.next_batch(self.now)
            self.running = batch if isinstance(batch, Batch) else None
        elif what == "end" and self.running is not None:
            batch, self.running = self.running, None
            if how == "fine":
                self.end(batch)
                return
            self.loop.raised(batch, RuntimeError("no"), last=False)
            for ticket in batch.tickets:
                single = self.loop.again(ticket, batch.key)
                if single is not None and how == "passes":
                    self.end(single)
                elif single is not None:
                    self.loop.raised(single, RuntimeError("no"), last=True)

    def settle(self) -> None:
        """Let everything come to its end."""
        self.handle("end", None, "fine")
        while (batch := self.loop.next_batch(self.now)) is not None:
            if isinstance(batch, Hold):
                self.now = batch.until
            else:
                self.end(batch)


@settings(max_examples=150)
@given(
    st.sampled_from(["stagewise", "fifo", "dynamic:4:0.05", "continuous:4"]),
    st.lists(_EVENT, min_size=5, max_size=60),
)
def test_every_picture_ends_exactly_once_and_nothing_stays_behind(policy: str, events: list[Any]) -> None:
    ledger = Ledger(policy)
    for event in events:
        ledger.handle(*event)
    ledger.settle()
    assert max(ledger.pixels.values(), default=1) == 1, "nothing is made twice"
    losses = Counter(message.id for message in ledger.said if isinstance(message, Lost))
    assert max(losses.values(), default=1) == 1
    for name, count in ledger.asked.items():
        finished = sum(1 for key in ledger.pixels if key[0] == name and key[2] < 0)
        ends = [finished == count, name in losses, name in ledger.cancelled]
        assert sum(ends) == 1, (name, ends)
        assert (name in ledger.made) == ends[0]
    assert list(ledger.loop.stations.waiting()) == [] and not ledger.loop._requests
    began = [message.batch for message in ledger.said if isinstance(message, Began)]
    assert began == [message.batch for message in ledger.said if isinstance(message, Ended)], "each begun batch ends"
    assert not any(isinstance(ticket, Preview) for ticket in ledger.loop.stations.waiting())
