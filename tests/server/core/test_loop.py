"""The life of requests inside an engine: deadlines, leaving while a batch runs, failures, films, suspects."""

from __future__ import annotations

import pytest

from server.core.loop import Batch
from server.core.messages import Began, Ended, Lost
from server.core.policies import POLICIES
from server.core.policies.fifo import FifoPolicy
from server.core.stations import Stations
from server.core.tickets import Picture, Preview
from server.core.work import Work
from tests.server.core.desk import COSTS, DECODE, ENCODE, HIGH, LOW, SHOW, Desk, names

PATIENT = {key: {1: 0.01} for key in COSTS}


def test_a_picture_goes_through_its_stations_and_says_so() -> None:
    desk = Desk()
    desk.submit("a", partial_images=1)
    desk.run()
    assert [batch.key for batch in desk.batches] == [ENCODE, LOW, LOW, SHOW, HIGH, HIGH, DECODE]
    assert desk.pixels == {("a", 0, 0): 1, ("a", 0, -1): 1} and desk.lost() == {}
    began = [message for message in desk.said if isinstance(message, Began)]
    ended = [message for message in desk.said if isinstance(message, Ended)]
    assert [message.batch for message in began] == [message.batch for message in ended]
    assert began[0].members == (("a", 0),) and began[3].members == () and began[3].previews == ("a",)
    assert ended[-1].moved[0].station is None and ended[0].moved[0].station == LOW


def test_a_picture_that_cannot_be_ready_in_time_is_given_up_and_no_other() -> None:
    desk = Desk()
    desk.submit("hopeless", deadline=0.2)
    desk.submit("fine", deadline=10.0)
    desk.run()
    assert desk.lost() == {"hopeless": "late"} and desk.made == ["fine"]


def test_a_deadline_that_passes_while_its_step_runs_is_seen_after_it() -> None:
    desk = Desk(PATIENT)
    desk.submit("slow", deadline=5.0)
    batch = desk.until(LOW)
    desk.now = 6.0
    desk.end(batch)
    assert desk.loop.next_batch(desk.now) is None and desk.lost() == {"slow": "late"}
    assert desk.loop.idle and not desk.loop._requests


def test_a_late_request_leaves_with_all_its_pictures_even_those_that_run() -> None:
    desk = Desk({**PATIENT, HIGH: {1: 0.01}})
    desk.submit("late", n=3, deadline=1.0)
    batch = desk.until(HIGH)
    assert len(batch.tickets) == 1
    desk.now = 2.0
    assert desk.loop.next_batch(desk.now) is None, "the two that wait are given up"
    desk.end(batch)
    assert desk.lost() == {"late": "late"} and desk.loop.idle and desk.pixels.total() == 0


@pytest.mark.parametrize("key", [ENCODE, LOW, HIGH, DECODE])
def test_what_is_cancelled_while_it_runs_is_dropped_when_its_batch_ends(key: object) -> None:
    desk = Desk()
    desk.submit("gone", partial_images=1)
    desk.submit("stays")
    batch = desk.until(key)  # type: ignore[arg-type]
    while "gone" not in names(batch):
        desk.end(batch)
        batch = desk.until(key)  # type: ignore[arg-type]
    assert "gone" in names(batch)
    desk.loop.cancel("gone")
    desk.loop.cancel("gone")
    desk.end(batch)
    desk.run()
    assert desk.made == ["stays"] and ("gone", 0, -1) not in desk.pixels and not desk.loop._requests


def test_a_request_that_is_known_already_is_left_as_it_is() -> None:
    desk = Desk()
    desk.submit("a")
    desk.submit("a")
    desk.run()
    assert desk.pixels == {("a", 0, -1): 1}


def test_pictures_that_are_done_already_are_not_made_again() -> None:
    desk = Desk()
    desk.submit("again", n=3, done=(0, 2))
    desk.submit("nothing left", n=1, done=(0,))
    desk.run()
    assert desk.pixels == {("again", 1, -1): 1} and not desk.loop._requests


def test_an_urgent_request_goes_before_a_crowd() -> None:
    desk = Desk()
    for number in range(8):
        desk.submit(f"early {number}", "0+4")
    desk.submit("urgent", "0+4", deadline=1.2)
    desk.run()
    assert desk.made[0] == "urgent"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_suspect_has_no_company(policy: str) -> None:
    desk = Desk(policy=policy)
    for number in range(4):
        desk.submit(f"fine {number}")
    desk.submit("suspect", n=2, alone=True)
    desk.submit("other suspect", alone=True)
    desk.run()
    assert len(desk.made) == 6
    for batch in desk.batches:
        who = set(names(batch))
        assert len(who) == 1 or not who & {"suspect", "other suspect"}
    assert any(names(batch) == ["suspect", "suspect"] for batch in desk.batches), "its own pictures are no strangers"


def test_a_film_is_charged_its_own_share_of_a_batch() -> None:
    """Charged the whole time of shared batches, of four films that ran together two failed; each alone was in time."""
    costs = {**COSTS, LOW: {1: 0.2, 2: 0.36}, HIGH: {1: 0.2, 2: 0.36}}
    for together in (1, 4):
        desk = Desk(costs, film_seconds=1.0)
        for number in range(together):
            desk.submit(f"film {number}", frames_per_second=16)
        desk.run()
        assert desk.lost() == {} and len(desk.made) == together
    assert any(len(batch.tickets) == 2 and batch.key in (LOW, HIGH) for batch in desk.batches), "they did share"


def test_a_films_waiting_does_not_count_and_its_work_does() -> None:
    desk = Desk(film_seconds=0.6)
    desk.submit("film", frames_per_second=16)
    desk.now = 1e6
    desk.run()
    assert desk.made == ["film"]
    slow = Desk(film_seconds=0.6)
    slow.truth.replace(LOW, {1: 0.5})
    slow.submit("film", frames_per_second=16)
    slow.run()
    assert slow.lost() == {"film": "late"}


def test_a_films_text_and_its_decoding_are_not_of_its_time() -> None:
    desk = Desk(film_seconds=0.6)
    desk.truth.replace(ENCODE, {1: 50.0})
    desk.truth.replace(DECODE, {1: 50.0})
    desk.submit("film", frames_per_second=16)
    desk.run()
    assert desk.made == ["film"]


def test_shares_of_guided_and_plain_rows_add_up_to_the_batch() -> None:
    desk = Desk()
    desk.submit("a", "teacher", n=2)
    desk.submit("b", "0+4")
    pictures = [t for t in desk.loop.stations.waiting() if isinstance(t, Picture)]
    desk.run()
    spent = sum(desk.truth.seconds(batch.key, batch.rows) for batch in desk.batches)
    assert sum(picture.record.charged for picture in pictures) == pytest.approx(spent)
    assert all(picture.record.charged <= picture.record.compute + 1e-9 for picture in pictures)


def test_previews_are_paid_for_by_their_account() -> None:
    desk = Desk()
    charged: list[tuple[str, float]] = []
    desk.loop.policy.charge = lambda work, seconds: charged.append((work.account, seconds))  # type: ignore[method-assign]
    desk.submit("watched", "0+4", partial_images=3, account="one")
    desk.run()
    spent = sum(desk.truth.seconds(batch.key, batch.rows) for batch in desk.batches)
    assert sum(seconds for _, seconds in charged) == pytest.approx(spent) and {name for name, _ in charged} == {"one"}
    assert sum(isinstance(ticket, Preview) for batch in desk.batches for ticket in batch.tickets) == 3


def test_what_batches_take_is_learnt() -> None:
    desk = Desk()
    desk.truth.replace(LOW, {1: 0.3, 2: 0.5, 4: 0.9, 8: 1.7})
    for number in range(40):
        desk.submit(str(number))
        desk.submit(f"other {number}")
        desk.run()
    assert desk.costs.seconds(LOW, 2) == pytest.approx(0.5)


# -- failures ----------------------------------------------------------------------------------------------------------


def failing(desk: Desk, guilty: str) -> None:
    """Run everything, as an engine does whose batches raise where a request is among them."""
    while isinstance(batch := desk.loop.next_batch(desk.now), Batch):
        error = RuntimeError("poison")
        if batch.key.kind == "encode" or guilty not in names(batch):
            desk.end(batch)
            continue
        desk.loop.raised(batch, error, last=False)
        for ticket in batch.tickets:
            single = desk.loop.again(ticket, batch.key)
            if single is None:
                continue
            if guilty in names(single):
                desk.loop.raised(single, error, last=True)
            else:
                desk.end(single)


def test_only_the_guilty_fail() -> None:
    desk = Desk()
    for name in ("a", "poison", "b"):
        desk.submit(name, n=2)
    failing(desk, "poison")
    assert desk.lost() == {"poison": "failed"} and sorted(desk.made) == ["a", "b"]
    assert desk.loop.idle and not desk.loop._requests
    (lost,) = (message for message in desk.said if isinstance(message, Lost))
    assert lost.reason == "RuntimeError: poison"


def test_a_partial_picture_that_fails_costs_nobody_the_picture() -> None:
    desk = Desk()
    desk.submit("watched", partial_images=1)
    batch = desk.until(SHOW)
    desk.loop.raised(batch, RuntimeError("no"), last=False)
    single = desk.loop.again(batch.tickets[0], batch.key)
    assert single is not None
    desk.loop.raised(single, RuntimeError("no"), last=True)
    desk.run()
    assert desk.pixels == {("watched", 0, -1): 1} and desk.lost() == {}


class Broken:
    """A policy that raises where a request of this name waits; asked often enough, it always does."""

    def __init__(self, inner: FifoPolicy, name: str) -> None:
        self._inner, self._name = inner, name

    def charge(self, work: Work, seconds: float) -> None:
        """Raises too where it is broken for everybody."""
        if self._name == "":
            raise ZeroDivisionError("charge")

    def choose(self, stations: Stations, now: float) -> object:
        if any(self._name in ticket.request.work.id for ticket in stations.waiting()):
            raise ZeroDivisionError("choose")
        return self._inner.choose(stations, now)


def test_a_request_that_the_policy_cannot_bear_fails_alone() -> None:
    desk = Desk()
    desk.loop.policy = broken = Broken(FifoPolicy(desk.costs), "odd")  # type: ignore[assignment]
    for name in ("a", "odd", "b"):
        desk.submit(name)
    desk.run()
    assert desk.lost() == {"odd": "failed"} and sorted(desk.made) == ["a", "b"]
    desk.submit("odd again")
    desk.run()
    desk.submit("c")
    desk.run()
    assert "c" in desk.made and desk.loop.policy is broken


def test_a_policy_that_raises_once_costs_nobody_anything() -> None:
    desk = Desk()
    inner, raised = desk.loop.policy.choose, list[int]()

    def once(stations: Stations, now: float) -> object:
        if not raised:
            raised.append(1)
            raise KeyError("once")
        return inner(stations, now)

    desk.loop.policy.choose = once  # type: ignore[method-assign, assignment]
    desk.submit("a")
    desk.run()
    assert raised and desk.made == ["a"] and desk.lost() == {}


def test_a_policy_that_raises_for_everybody_is_replaced_by_fifo(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk()
    desk.loop.policy = Broken(FifoPolicy(desk.costs), "")  # type: ignore[assignment]
    for number in range(3):
        desk.submit(str(number))
        desk.now += 0.001
    desk.run()
    assert desk.made == ["0", "1", "2"] and desk.lost() == {}
    assert isinstance(desk.loop.policy, FifoPolicy) and caplog.text.count("fifo from now on") == 1


def test_a_policy_that_raises_again_and_again_is_replaced_too() -> None:
    desk = Desk()
    desk.loop.policy = Broken(FifoPolicy(desk.costs), "")  # type: ignore[assignment]
    for number in range(5):
        desk.submit(str(number))
        desk.run()
    assert isinstance(desk.loop.policy, FifoPolicy)
    assert len(desk.lost()) <= 2 and {"3", "4"} <= set(desk.made)
