"""Batches that run at the same time, each on a part of the device: what they cost, and who is in them."""

from __future__ import annotations

from typing import Any

import pytest

from server.core.costs import CostTable
from server.core.loop import Batch, Loop
from server.core.messages import Began, Ended, Lost, Message
from server.core.policies import make_policy
from server.core.running import Running
from server.core.stations import StationKey
from server.core.tracks import TrackCosts
from server.core.work import Work
from tests.server.core.desk import CARD, ENCODE, HIGH, LOW, names

# Eight rows take 0.8 s with the whole device, so four take as long on half of it.
EVEN = {1: 0.12, 2: 0.22, 4: 0.42, 8: 0.8}


class Crowd:
    """A loop whose policy chooses for tracks, and as many requests as are asked for."""

    def __init__(self, count: int) -> None:
        keys = dict.fromkeys((ENCODE, LOW, HIGH, StationKey("decode", size=HIGH.size)), EVEN)
        self.costs = CostTable(keys)
        self.seen = TrackCosts(self.costs)
        self.said: list[Message] = []
        self.loop = Loop([CARD], self.costs, make_policy("stagewise", self.seen), self.said.append, seen=self.seen)
        for number in range(count):
            work = Work(id=f"r{number}", prompt=f"{number}", schedule="2+2", seeds=(number,), arrived=0.0, deadline=1e9)
            self.loop.submit(work, 0.0)

    def begin(self, tracks: int) -> Batch:
        batch = self.loop.next_batch(1.0, tracks)
        assert isinstance(batch, Batch)
        return batch

    def end(self, batch: Batch, seconds: float) -> None:
        for picture in batch.pictures:
            picture.request.conditioning = {}
        self.loop.ended(batch, seconds, 2.0, {}, batch.rows)


def test_a_batch_on_a_track_costs_what_the_rows_of_all_tracks_cost_together() -> None:
    costs = CostTable({LOW: EVEN})
    seen = TrackCosts(costs)
    assert seen.widths(LOW) == (1, 2, 4, 8) and seen.seconds(LOW, 4) == costs.seconds(LOW, 4)
    seen.count = 2
    assert seen.widths(LOW) == (1, 2, 4)
    assert [seen.seconds(LOW, rows) for rows in (1, 2, 3, 4)] == pytest.approx([0.22, 0.42, 0.8, 0.8])
    assert [count for count, _ in seen.offers(LOW, [1] * 6)] == [1, 2, 4]
    assert TrackCosts(CostTable({})).widths(LOW) == (1,)
    lone = TrackCosts(CostTable({LOW: {1: 0.1}}))
    lone.count = 2
    assert lone.widths(LOW) == (1,) and lone.seconds(LOW, 1) == pytest.approx(0.2)


def test_two_batches_at_a_time_hold_different_requests_and_end_in_any_order() -> None:
    crowd = Crowd(8)
    first, second = crowd.begin(2), crowd.begin(2)
    assert first.tracks == second.tracks == 2 and len(first.tickets) == len(second.tickets) == 4
    assert not set(names(first)) & set(names(second))
    assert first.expected == pytest.approx(0.8)
    crowd.end(second, 0.9)
    third = crowd.begin(2)
    assert third.key == LOW and set(names(third)) == set(names(second))
    crowd.end(first, 1.0)
    ended = [message for message in crowd.said if isinstance(message, Ended)]
    assert [message.batch for message in ended] == [second.number, first.number]
    assert all(message.tracks == 2 and message.rows == 4 for message in ended)


def test_what_a_batch_took_on_a_track_is_learnt_for_the_width_of_all_tracks_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crowd, learnt = Crowd(8), list[tuple[StationKey, int, float]]()
    monkeypatch.setattr(crowd.costs, "observe", lambda *batch: learnt.append(batch))
    crowd.end(crowd.begin(2), 0.9)
    crowd.end(crowd.begin(1), 0.5)
    assert learnt == [(ENCODE, 8, 0.9), (ENCODE, 4, 0.5)]


def test_a_request_pays_for_its_part_of_the_device_alone() -> None:
    charged: dict[int, float] = {}
    for tracks in (1, 2):
        crowd = Crowd(8)
        batch = crowd.begin(tracks)
        crowd.end(batch, 0.8)
        charged[tracks] = batch.pictures[0].record.charged
        assert batch.pictures[0].record.encode == pytest.approx(0.8), "it waited for all of it"
    assert charged[2] == pytest.approx(0.8 / 4 / 2)
    assert charged[1] == pytest.approx(0.8 / 8)


@pytest.mark.parametrize("more", [{"alone": True}, {"frames_per_second": 8}])
def test_a_crowd_is_none_while_a_suspect_or_a_film_waits(more: dict[str, Any]) -> None:
    crowd = Crowd(8)
    assert crowd.loop.crowded(8) and not crowd.loop.crowded(9)
    work = Work(id="suspect", prompt="s", schedule="2+2", seeds=(1,), arrived=0.0, deadline=1e9, **more)
    crowd.loop.submit(work, 0.0)
    assert not crowd.loop.crowded(1)
    crowd.loop.cancel("suspect")
    assert crowd.loop.crowded(8)


def test_a_batch_that_raises_on_a_track_leaves_its_tickets_to_be_tried_alone() -> None:
    crowd = Crowd(8)
    bad, good = crowd.begin(2), crowd.begin(2)
    crowd.loop.raised(bad, RuntimeError("no"), last=False)
    crowd.end(good, 0.8)
    single = crowd.loop.again(bad.tickets[0], bad.key)
    assert single is not None and single.tracks == 1
    crowd.loop.raised(single, RuntimeError("no"), last=True)
    assert [message.id for message in crowd.said if isinstance(message, Lost)] == [names(bad)[0]]


def test_the_batches_that_run_are_known_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("server.core.running.time.monotonic", lambda: now[0])
    running = Running()
    first, second = (Began(number, LOW, ((f"r{number}", 0),), (), expected=0.5) for number in (1, 2))
    assert running.note(first) is None and running.oldest == (first, 0.0)
    now[0] = 13.0
    running.note(second)
    assert running.batches == (first, second) and running.oldest == (first, 3.0)
    assert running.hung(2.0, 4.0) == "a batch at 128x128 took 3 s" and not running.hung(2.0, 20.0)
    running.forgive(3.0)
    assert not running.hung(2.0, 4.0)
    assert running.note(Ended(1, LOW, 4, 4, 0.5, ())) == first and running.batches == (second,)
    assert running.note(Ended(7, LOW, 4, 4, 0.5, ())) is None
    running.clear()
    assert running.batches == () and running.oldest is None
