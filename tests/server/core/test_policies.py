"""Which station runs next, and with whom."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from server.core.card import step_costs
from server.core.costs import CostTable
from server.core.loop import Loop
from server.core.policies import POLICIES, Choice, Hold, Policy, make_policy
from server.core.policies.continuous import ContinuousPolicy
from server.core.policies.dynamic import DynamicPolicy
from server.core.policies.fairness import Shares
from server.core.policies.fifo import FifoPolicy
from server.core.policies.stagewise import StagewisePolicy
from server.core.stations import Stations
from server.core.tickets import Preview, Request, Ticket
from server.core.work import Work
from tests.server.core.desk import (
    CARD,
    COSTS,
    DECODE,
    ENCODE,
    GUIDED,
    HIGH,
    LOW,
    LOW_SIZE,
    SCHEDULES,
    SHOW,
    Desk,
    names,
)

_numbers = itertools.count()


def request(arrived: float, schedule: str = "2+2", n: int = 1, cost: float = 1.0, **changes: Any) -> Request:
    """A request whose text is known, of ``cost`` seconds a picture."""
    found = SCHEDULES[schedule]
    work = Work(
        id=f"request {next(_numbers)}",
        prompt="a",
        schedule=schedule,
        seeds=tuple(range(n)),
        arrived=arrived,
        **changes,
    )
    steps = found.cascade.num_steps
    costs = tuple(cost * (steps - k) / steps + 0.01 for k in range(steps + 1))
    made = Request(work, found.cascade, found.lane, costs)
    made.conditioning = {}
    return made


def queues(*tickets: Ticket) -> Stations:
    stations = Stations()
    for ticket in tickets:
        stations.join(ticket.station(), ticket, ticket.request.work.arrived)
    return stations


def chosen(policy: Policy, stations: Stations, now: float) -> Choice:
    choice = policy.choose(stations, now)
    assert isinstance(choice, Choice), choice
    return choice


def first(policy: Policy, stations: Stations, now: float) -> Ticket:
    return chosen(policy, stations, now).tickets[0]


def stagewise(**costs: Any) -> StagewisePolicy:
    return StagewisePolicy(CostTable(costs.get("costs", {LOW: {1: 0.1}, HIGH: {1: 0.1}})))


# -- stagewise ---------------------------------------------------------------------------------------------------------


def test_what_is_nearly_done_goes_first_and_waiting_always_wins_in_the_end() -> None:
    policy = stagewise()
    fresh, nearly_done = request(0.0).pictures[0], request(0.0).pictures[0]
    nearly_done.step = 3
    choice = chosen(policy, queues(fresh, nearly_done), now=1.0)
    assert choice.station.key == HIGH and list(choice.tickets) == [nearly_done]

    long = request(0.0, cost=50.0).pictures[0]
    assert first(policy, queues(long, request(10.0).pictures[0]), 12.0) is not long, "a short one passes a long one"
    for arrived in (100.0, 200.0, 300.0, 400.0):
        if first(policy, queues(long, request(arrived).pictures[0]), arrived + 1.0) is long:
            break
    else:
        pytest.fail("a steady stream of short requests starves the long one")


def test_what_is_about_to_miss_its_deadline_goes_before_everything_else() -> None:
    """Short requests that keep coming have the higher ratio, but only until the long one's time runs out."""
    policy = stagewise()
    long = request(0.0, cost=50.0, deadline=120.0).pictures[0]
    shorts = [request(float(now), cost=0.1).pictures[0] for now in range(0, 120, 10)]
    stations = queues(long, *shorts)
    assert first(policy, stations, 19.0) in shorts
    assert first(policy, stations, 21.0) is long, "100 seconds are twice its work"


def test_pictures_of_one_prompt_count_once_where_prompts_are_encoded() -> None:
    policy = StagewisePolicy(CostTable({ENCODE: {1: 1.0, 2: 1.0, 4: 1.0}}))
    requests = [request(float(i), n=8) for i in range(5)]
    for one in requests:
        one.conditioning = None
    stations = queues(*(picture for one in requests for picture in one.pictures))
    choice = chosen(policy, stations, now=10.0)
    assert {id(ticket.request) for ticket in choice.tickets} == set(map(id, requests[:4])) and len(choice.tickets) == 32


def test_a_wide_batch_that_costs_little_more_outweighs_one_picture_at_a_late_stage() -> None:
    """The rule that looks at one head entry drains the late stage one by one, so that wide batches never come."""
    policy = stagewise(costs=COSTS)
    late = request(0.0).pictures[0]
    late.step = 2
    crowd = [request(0.0).pictures[0] for _ in range(8)]
    assert first(policy, queues(late, crowd[0]), 0.2) is late
    choice = chosen(policy, queues(late, *crowd), 0.2)
    assert choice.station.key == LOW and len(choice.tickets) == 8


def test_widths_that_pay_nothing_are_not_filled() -> None:
    pictures = [request(0.0).pictures[0] for _ in range(4)]
    for picture in pictures:
        picture.step = 2
    assert len(chosen(stagewise(costs=COSTS), queues(*pictures), 1.0).tickets) == 1


def test_a_preview_is_worth_what_its_picture_is_and_never_urgent() -> None:
    policy = stagewise(costs=COSTS)
    watched, other = request(5.0, deadline=6.2, cost=1.0), request(0.0, cost=1.0)
    watched.pictures[0].step = other.pictures[0].step = 2
    preview = Preview(watched.pictures[0], "x0", LOW_SIZE, 0)
    assert first(policy, queues(preview, other.pictures[0]), 5.5) is other.pictures[0], "it has waited longer"
    assert first(policy, queues(watched.pictures[0], other.pictures[0]), 5.5) is watched.pictures[0], "itself is urgent"


def test_the_longer_the_queues_the_fuller_the_batches() -> None:
    """A picture is decoded at once where that costs nobody much, and in company where many wait for the device."""
    costs = {LOW: {1: 0.1}, HIGH: {1: 0.1, 8: 0.7}, DECODE: {1: 0.2, 8: 0.8}}
    done = [request(0.0).pictures[0] for _ in range(3)]
    for picture in done:
        picture.step = 4
    following = [request(0.0).pictures[0] for _ in range(40)]
    for picture in following:
        picture.step = 3
    assert chosen(stagewise(costs=costs), queues(following[0], *done), 0.02).station.key == DECODE
    assert chosen(stagewise(costs=costs), queues(*following, *done), 0.02).station.key == HIGH


def test_patience_puts_what_waits_long_before_what_saves_much() -> None:
    crowd = [request(0.9).pictures[0] for _ in range(8)]
    late = request(0.0).pictures[0]
    late.step = 2
    stations = queues(late, *crowd)
    assert chosen(make_policy("stagewise", CostTable(COSTS)), stations, 1.0).station.key == LOW
    assert first(make_policy("stagewise:3", CostTable(COSTS)), stations, 1.0) is late


def test_nobody_who_asks_little_waits_behind_a_key_that_asks_for_much() -> None:
    desk = Desk()
    for number in range(40):
        desk.submit(f"greedy {number}", account="greedy")
    for _ in range(30):
        desk.step()
    for number in range(4):
        desk.submit(f"modest {number}", account="modest")
    before = len(desk.made)
    desk.run()
    places = [desk.made.index(f"modest {number}") - before for number in range(4)]
    assert max(places) < 14, "its share would be every other picture"
    assert len(desk.made) == 44


class Both(Desk):
    """A model of pictures and one of films, whose batches take three times as long, on one device."""

    def __init__(self) -> None:
        films = {replace(key, model="films"): {w: 3 * s for w, s in widths.items()} for key, widths in COSTS.items()}
        super().__init__({**COSTS, **films})
        cards = [CARD, replace(CARD, place="films", media="video")]
        self.loop = Loop(cards, self.costs, make_policy("stagewise", self.costs), self.said.append)

    def film(self, name: str) -> None:
        """Queue a film."""
        self.submit(name, model="films", frames_per_second=8)


def test_a_picture_does_not_wait_for_the_films_that_have_waited_long() -> None:
    desk = Both()
    for number in range(12):
        desk.film(f"film {number}")
    for _ in range(8):
        desk.step()
    desk.submit("picture")
    kinds = [desk.step().key.model for _ in range(6)]
    assert "picture" in desk.made and kinds == [""] * 6


def test_films_have_half_of_a_device_that_pictures_would_fill() -> None:
    desk = Both()
    for number in range(6):
        desk.film(f"film {number}")
    spent = {"": 0.0, "films": 0.0}
    asked = 0
    while sum(name.startswith("film") for name in desk.made) < 6:
        while sum(ticket.request.work.model == "" for ticket in desk.loop.stations.waiting()) < 8:
            asked += 1
            desk.submit(f"picture {asked}")
        before = desk.now
        batch = desk.step()
        spent[batch.key.model] += desk.now - before
    assert spent["films"] == pytest.approx(spent[""], rel=0.35)


def test_films_that_come_late_have_no_claim_on_the_time_before() -> None:
    desk = Both()
    for number in range(60):
        desk.submit(f"early {number}")
    desk.run()
    for number in range(12):
        desk.film(f"film {number}")
    desk.submit("picture")
    kinds = []
    while "picture" not in desk.made:
        kinds.append(desk.step().key.model)
    assert kinds.count("films") <= kinds.count("")


def test_films_batches_stay_short_while_pictures_are_about() -> None:
    desk = Both()
    for number in range(8):
        desk.film(f"film {number}")
    alone = [desk.step() for _ in range(4)]
    assert max(batch.rows for batch in alone) == 8, "the widest serves most films a second"
    desk.submit("picture")
    while "picture" not in desk.made:
        desk.step()
    beside = [desk.step() for _ in range(12)]
    assert {batch.key.model for batch in beside} == {"films"}
    assert all(desk.truth.seconds(batch.key, batch.rows) <= 0.35 for batch in beside)


def test_shares_fade_and_are_bounded() -> None:
    shares = Shares()
    assert shares.weights({"a"}) == {"a": 1.0}
    assert shares.weights({"a", "b"}) == {"a": pytest.approx(1.0), "b": pytest.approx(1.0)}
    shares.charge("a", 8.0)
    weights = shares.weights({"a", "b"})
    assert weights["b"] == 4.0 and 0.25 <= weights["a"] < 1.0, "at most fourfold"
    for _ in range(100):
        shares.charge("b", 1.0)
    weights = shares.weights({"a", "b"})
    assert weights["a"] == 4.0 > weights["b"], "what it had long ago is forgotten"


# -- the others --------------------------------------------------------------------------------------------------------


def test_fifo_serves_one_request_after_the_other() -> None:
    desk = Desk(policy="fifo")
    for number, (schedule, n) in enumerate((("2+2", 1), ("0+4", 3), ("2+2", 2))):
        desk.submit(str(number), schedule, n)
        desk.now += 0.001
    desk.run()
    assert desk.made == ["0", "1", "2"]
    assert all(len(set(names(batch))) == 1 for batch in desk.batches)
    assert any(len(batch.tickets) == 3 for batch in desk.batches), "its own pictures together"


def test_dynamic_gathers_one_schedule_and_runs_it_to_its_end() -> None:
    desk = Desk(policy="dynamic:4:0.05")
    for number in range(6):
        desk.submit(f"cascade {number}")
    desk.submit("full", "0+4")
    assert desk.loop.next_batch(desk.now) is not None
    desk = Desk(policy="dynamic:4:0.05")
    for number in range(6):
        desk.submit(f"cascade {number}")
        desk.now += 0.001
    desk.submit("full", "0+4")
    desk.run()
    groups: list[set[str]] = []
    for batch in desk.batches:
        if not groups or set(names(batch)) != groups[-1]:
            groups.append(set(names(batch)))
    assert groups == [{f"cascade {n}" for n in range(4)}, {"cascade 4", "cascade 5"}, {"full"}]


def test_dynamic_waits_for_company_no_longer_than_its_window() -> None:
    desk = Desk(policy="dynamic:2:0.05")
    desk.submit("first")
    desk.now = 0.01
    held = desk.loop.next_batch(desk.now)
    assert held == Hold(0.05), "from its arrival"
    desk.submit("other schedule", "0+4")
    assert desk.loop.next_batch(desk.now) == Hold(0.05)
    desk.submit("second")
    assert set(names(desk.begin())) == {"first", "second"}, "full: no reason to wait"
    late = Desk(policy="dynamic:2:0.05")
    late.submit("alone")
    late.now = 0.05
    assert names(late.begin()) == ["alone"]


def test_dynamic_takes_a_request_that_is_larger_than_a_group() -> None:
    desk = Desk(policy="dynamic:2:0")
    desk.submit("large", n=5)
    desk.now = 0.001
    desk.submit("next")
    desk.run()
    assert desk.made == ["large", "next"]
    assert max(batch.rows for batch in desk.batches if batch.key == LOW) == 2


def test_continuous_lets_newcomers_of_the_same_schedule_join_at_any_step() -> None:
    desk = Desk(policy="continuous:8")
    desk.submit("first")
    assert desk.until(LOW).key == LOW
    desk.end(desk.batches[-1])
    desk.now += 0.001
    desk.submit("second")
    desk.submit("other", "1+3")
    desk.run()
    together = [batch for batch in desk.batches if set(names(batch)) == {"first", "second"}]
    assert together, "a step is shared, though the first is further"
    assert all(len({ticket.request.work.schedule for ticket in batch.tickets}) == 1 for batch in desk.batches)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_finishes_everything_and_minds_the_widths(policy: str) -> None:
    desk = Desk(policy=policy)
    for number in range(5):
        desk.submit(f"small {number}", partial_images=1)
        desk.submit(f"large {number}", "0+4", n=3)
        desk.now += 0.02
    desk.submit("guided", "teacher", n=2)
    desk.run()
    assert len(desk.made) == 11 and desk.loop.idle
    widest = {key: max(widths) for key, widths in COSTS.items()}
    assert all(batch.rows <= widest[batch.key] for batch in desk.batches)
    assert {batch.key for batch in desk.batches} == {ENCODE, LOW, HIGH, GUIDED, DECODE, SHOW}
    made = {(name, index): times for (name, index, number), times in desk.pixels.items() if number < 0}
    assert len(made) == 5 + 15 + 2 and set(made.values()) == {1}


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_queued_means_nothing_to_run(policy: str) -> None:
    assert make_policy(policy, CostTable({})).choose(Stations(), 0.0) is None


def test_policies_are_made_by_name() -> None:
    costs = CostTable(COSTS)
    made = {
        "stagewise": StagewisePolicy,
        "stagewise:1.5": StagewisePolicy,
        "fifo": FifoPolicy,
        "dynamic": DynamicPolicy,
        "dynamic:4": DynamicPolicy,
        "dynamic:16:0.1": DynamicPolicy,
        "continuous": ContinuousPolicy,
        "continuous:4": ContinuousPolicy,
    }
    assert {text: type(make_policy(text, costs)) for text in made} == made


@pytest.mark.parametrize(
    "text", ["", "lifo", "fifo:1", "dynamic:x", "dynamic:8:x", "dynamic:8:0.1:2", "continuous:a", "stagewise:1:2", ":"]
)
def test_a_policy_that_is_none_is_named_with_those_there_are(text: str) -> None:
    with pytest.raises(ValueError, match=r"is none of stagewise, fifo, dynamic, continuous"):
        make_policy(text, CostTable({}))


@pytest.mark.parametrize("text", ["dynamic:0", "dynamic:-1", "dynamic:8:-1", "dynamic:8:nan", "continuous:0"])
def test_a_policy_that_could_serve_nobody_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="policy"):
        make_policy(text, CostTable({}))


def test_costs_of_previews_are_part_of_a_request() -> None:
    desk = Desk()
    cascade = SCHEDULES["0+4"].cascade
    desk.submit("watched", "0+4", partial_images=3)
    desk.submit("plain", "0+4")
    watched, plain = (next(t for t in desk.loop.stations.waiting() if t.request.work.id == name).remaining_seconds
                      for name in ("watched", "plain"))  # fmt: skip
    assert watched == pytest.approx(step_costs(desk.costs, cascade, "student", partial_images=3)[0])
    assert watched > plain and math.isclose(watched - plain, 0.3)
