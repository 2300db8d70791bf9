"""Loops that share out stages, without a device: what is handed over, and what is left where."""

from __future__ import annotations

from typing import Any

import pytest

from server.core.costs import CostTable, JoinedCosts
from server.core.loop import Batch, Loop
from server.core.messages import Ended, HandedOver, Lost, Submit, pack, unpack_command
from server.core.policies import make_policy
from server.core.stages import ALL, SETS, costs_in, name_of, parse_stages, stations_in
from server.core.stations import StationKey
from server.core.work import Work
from tests.server.core.desk import CARD, COSTS, DECODE, ENCODE, GUIDED, HIGH, LOW, SCHEDULES, SHOW, WIDE, Desk


class Part(Desk):
    """A desk with some of the stages."""

    def __init__(self, stages: str) -> None:
        super().__init__()
        policy = make_policy("stagewise", self.costs)
        told: dict[str, Any] = {"stages": parse_stages(stages), "dump": lambda data: ((1,), repr(data).encode())}
        self.loop = Loop([CARD], self.costs, policy, self.said.append, **told)

    def handed(self) -> list[HandedOver]:
        return [message for message in self.said if isinstance(message, HandedOver)]

    def ran(self) -> list[StationKey]:
        return [batch.key for batch in self.batches]


def go_on(part: Part, command: Submit) -> None:
    """As the front sends it on: through the wire."""
    through = unpack_command(pack(command))
    assert isinstance(through, Submit)
    part.loop.submit(through.work, part.now, [(state, state.latents) for state in through.states])


def test_a_picture_goes_from_part_to_part_and_is_forgotten_behind_each() -> None:
    low, high, decode = Part("low"), Part("high"), Part("decode")
    work = low.submit("a", n=2, partial_images=1)
    low.run()
    assert low.ran() == [ENCODE, LOW, LOW] and not low.loop._requests
    shown = [each.state for each in low.handed() if each.state.number >= 0]
    pictures = [each.state for each in low.handed() if each.state.number < 0]
    assert [(each.index, each.number, each.size) for each in shown] == [(0, 0, LOW.size), (1, 0, LOW.size)]
    assert [(each.index, each.step) for each in pictures] == [(0, 2), (1, 2)]
    assert isinstance(low.said[-1], HandedOver) and low.said.index(low.handed()[0]) > 0
    ended = [each for each in low.said if isinstance(each, Ended)][-1]
    assert [moved.station for moved in ended.moved] == [HIGH, HIGH], "they wait there, and were heard to leave first"
    nothing_new = Submit(work.__class__(**{**_plain(work), "done": (0, 1)}))
    for state in pictures:
        go_on(high, Submit(nothing_new.work, (state,)))
    high.run()
    assert high.ran() == [ENCODE, HIGH, HIGH, HIGH, HIGH] and not high.loop._requests
    assert all(set(each.state.record.stages) == {"128x128", "256x256"} for each in high.handed())
    for state in (*shown, *(each.state for each in high.handed())):
        go_on(decode, Submit(nothing_new.work, (state,)))
    decode.run()
    assert set(decode.ran()) == {SHOW, DECODE}, "it needs no text"
    assert decode.pixels == {("a", i, number): 1 for i in (0, 1) for number in (-1, 0)}
    assert not decode.loop._requests


def _plain(work: Any) -> dict[str, Any]:
    return {name: getattr(work, name) for name in work.__struct_fields__}


def test_a_guest_goes_though_its_picture_is_made_first_and_costs_nobody_a_picture() -> None:
    low, decode = Part("low"), Part("decode")
    work = low.submit("a", partial_images=1)
    low.run()
    shown, picture = (each.state for each in low.handed())
    done = work.__class__(**{**_plain(work), "done": (0,)})
    go_on(decode, Submit(done, (shown,)))
    batch = decode.begin()
    decode.loop.raised(batch, RuntimeError("no memory"), last=True)
    assert not decode.loop._requests and not decode.lost(), "a courtesy"
    assert picture.number < 0


def test_what_is_here_already_is_left_as_it_is_and_more_of_a_request_joins_it() -> None:
    part = Part("low+decode")
    work = part.submit("a", n=3, done=(1, 2))
    part.submit("a", n=3, done=(1, 2))
    part.submit("a", n=3, done=(0, 2))
    part.run()
    assert sorted(each.state.index for each in part.handed()) == [0, 1]
    state = part.handed()[0].state
    done = work.__class__(**{**_plain(work), "done": (0, 1, 2)})
    back = type(state)(index=0, step=4, shape=state.shape, latents=state.latents, record=state.record)
    for _ in range(2):
        go_on(part, Submit(done, (back,)))
    part.run()
    assert part.pixels == {("a", 0, -1): 1}


def test_what_is_to_go_on_elsewhere_leaves_an_engine_that_could_do_it() -> None:
    part = Part("all")
    work = _a_work(partial_images=1)
    part.loop.submit(work, part.now, elsewhere=frozenset({"decode"}))
    part.submit("b")
    part.run()
    assert [(each.id, each.state.step, each.state.number) for each in part.handed()] == [("a", 1, 0), ("a", 4, -1)]
    assert part.pixels == {("b", 0, -1): 1} and not part.loop._requests
    state = part.handed()[-1].state
    done = work.__class__(**{**_plain(work), "done": (0,)})
    go_on(part, Submit(done, (state,)))
    part.run()
    assert part.pixels["a", 0, -1] == 1, "back here, where nobody else was sooner"


def _a_work(**fields: Any) -> Work:
    return Work(id="a", prompt="a", schedule="2+2", seeds=(0,), **fields)


def test_what_is_handed_over_keeps_its_deadline_and_can_be_cancelled() -> None:
    low, decode = Part("low"), Part("decode")
    work = low.submit("a", deadline=100.0)
    low.run()
    (handed,) = low.handed()
    done = work.__class__(**{**_plain(work), "done": (0,)})
    decode.now = 101.0
    go_on(decode, Submit(done, (handed.state,)))
    decode.run()
    assert [message.why for message in decode.said if isinstance(message, Lost)] == ["late"]
    decode.now = 1.0
    go_on(decode, Submit(done, (handed.state,)))
    decode.loop.cancel("a")
    assert decode.loop.next_batch(decode.now) is None and not isinstance(decode.batches[-1:], Batch)


def test_the_stages_of_a_cost_and_the_stations_of_a_card() -> None:
    cascade = SCHEDULES["2+2"].cascade
    costs = (10.0, 9.0, 7.0, 4.0, 1.0)
    assert costs_in(costs, cascade, ALL) == costs
    assert costs_in(costs, cascade, frozenset({"low"})) == (3.0, 2.0, 0.0, 0.0, 0.0)
    assert costs_in(costs, cascade, frozenset({"low", "decode"})) == (4.0, 3.0, 1.0, 1.0, 1.0)
    for step in range(5):
        parts = [costs_in(costs, cascade, frozenset({stage}))[step] for stage in ALL]
        assert sum(parts) == pytest.approx(costs[step])
    assert stations_in(CARD, ALL) == (*CARD.stations(), *CARD.preview_stations())
    assert stations_in(CARD, frozenset({"low"})) == (ENCODE, LOW)
    assert stations_in(CARD, frozenset({"high"})) == (ENCODE, HIGH, GUIDED), "the teacher has one size, the last"
    assert stations_in(CARD, frozenset({"decode"})) == (DECODE, SHOW)
    assert len(set(SETS)) == 7 and all(parse_stages(name_of(each)) == each for each in SETS)


def test_costs_of_stations_on_different_engines() -> None:
    low, decode = CostTable({LOW: WIDE}), CostTable({DECODE: {1: 0.5, 2: 0.6}})
    joined, one = JoinedCosts([low, decode]), CostTable(COSTS)
    assert joined.seconds(DECODE, 2) == 0.6 and joined.first(DECODE, 2) == 0.6 and joined.shared(DECODE, 1) == 0.3
    assert joined.widest(LOW) == one.widest(LOW) and joined.seconds(LOW, 4) == one.seconds(LOW, 4)
    for _ in range(20):
        decode.observe(DECODE, 1, 2.0)
    assert joined.seconds(DECODE, 1) == pytest.approx(2.0), "as its engine learns"
