"""Who is given what, and what goes before a newcomer, where engines do not all do the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from server.core.admission import Admission
from server.core.faults import deadline_error
from server.core.messages import Cancel, HandedOver, Pixels, Submit
from server.core.stages import name_of, parse_stages
from server.core.work import PictureRecord, PictureState, Work
from server.front.engine import EngineLink
from server.front.generation import (
    Advanced,
    Event,
    Failed,
    FinishedPicture,
    Generation,
    GenerationSpec,
    PartialPicture,
)
from server.front.ledger import Ledger
from server.front.member import Health, WatchLimits
from server.front.members import Members
from server.front.placing import Placing
from server.telemetry.metrics import Metrics, Snapshot
from tests.server.core.desk import CARD, SCHEDULES

CASCADE = SCHEDULES["2+2"].cascade
COSTS = (12.0, 11.0, 10.0, 8.0, 6.0)
"""Two low steps of 1 second, two high ones of 2, a decoding of 6."""


class Desk:
    """A front's books, and engines that nobody runs."""

    def __init__(self, *engines: str) -> None:
        self.members = Members([(f"gpu {i}", _no_engine) for i in range(len(engines))], WatchLimits())
        for member, stages in zip(self.members, engines, strict=True):
            member.stages, member.health, member.cards = parse_stages(stages), Health.READY, {"": CARD}
        self.ledger = Ledger(
            Metrics(_no_scrape), 1, lambda generation: self.placing.forget(generation), lambda *_: None
        )
        self.placing = Placing(self.members, self.ledger)
        self.admission = Admission(99, 99)
        self.events: list[Event] = []

    def submit(self, name: str, n: int = 1) -> Generation:
        spec = GenerationSpec("a", "2+2", CASCADE, "student", tuple(range(n)))
        work = Work(id=name, prompt="a", schedule="2+2", seeds=spec.seeds)
        generation = Generation(spec, work, self.admission.acquire(n, n), self.events.append, COSTS)
        self.ledger.add(generation)
        self.placing.place(generation)
        return generation

    def hand_over(self, generation: Generation, index: int, step: int, number: int = -1) -> None:
        engine = generation.places[index].engine
        assert engine is not None
        told: dict[str, Any] = {"shape": (1,), "latents": b"%d" % step, "record": PictureRecord(), "number": number}
        state = PictureState(index=index, step=step, **told)
        handed = self.ledger.handed_over(HandedOver(generation.id, state), engine)
        assert handed is generation
        self.placing.place(generation)

    def decode(self, generation: Generation, index: int, number: int = -1) -> None:
        """Its pixels come, and are compressed."""
        told = Pixels(generation.id, index, (8, 8, 3), "8x8", number, PictureRecord())
        self.ledger.decoded(told, memoryview(bytes(192)))
        while self.ledger.depths(())["package"]:
            time.sleep(0.001)

    def given(self) -> list[tuple[int, str, Sequence[int], Sequence[tuple[int, int]]]]:
        """What was sent since the last look: (engine, request, pictures that begin, (picture, step) that go on)."""
        found = []
        while self.placing.outbox:
            member, command = self.placing.outbox.popleft()
            assert isinstance(command, Submit) and command.sent
            begin = [i for i in range(len(command.work.seeds)) if i not in command.work.done]
            states = [(state.index, state.step) for state in command.states]
            found.append((member.index, command.work.id, begin, states))
        return found


def _no_engine() -> EngineLink:
    raise AssertionError("none is started")


def _no_scrape() -> Snapshot:
    raise AssertionError("nobody looks")


def test_each_picture_goes_to_the_first_engine_of_its_next_stage() -> None:
    desk = Desk("low", "high", "decode", "decode")
    one = desk.submit("one", n=2)
    assert desk.given() == [(0, "one", [0, 1], [])], "together, as they begin"
    desk.hand_over(one, 1, step=2)
    desk.hand_over(one, 0, step=2)
    assert desk.given() == [(1, "one", [], [(1, 2)]), (1, "one", [], [(0, 2)])]
    desk.hand_over(one, 1, step=4)
    desk.hand_over(one, 0, step=4)
    assert desk.given() == [(2, "one", [], [(1, 4)]), (3, "one", [], [(0, 4)])], "the other decoder is free"
    assert desk.placing.work() == {"": 0.0, "gpu 0": 0.0, "gpu 1": 0.0, "gpu 2": 6.0, "gpu 3": 6.0}


def test_an_engine_that_could_go_on_leaves_it_to_one_that_is_free_sooner() -> None:
    """Else one that only decodes would have nothing to do beside those that do everything."""
    desk = Desk("all", "decode")

    def elsewhere() -> list[tuple[int, str]]:
        sent = [(member.index, command) for member, command in desk.placing.outbox]
        desk.placing.outbox.clear()
        return [(index, name_of(command.elsewhere)) for index, command in sent if isinstance(command, Submit)]

    one = desk.submit("one")
    assert elsewhere() == [(0, "")], "nothing waits there"
    two, three = desk.submit("two", n=2), desk.submit("three")
    assert elsewhere() == [(0, "decode"), (0, "decode")]
    desk.hand_over(two, 0, step=4)
    desk.hand_over(two, 1, step=4)
    assert elsewhere() == [(1, "")] * 2
    desk.ledger.settle(one, deadline_error())
    desk.hand_over(three, 0, step=4)
    desk.submit("four")
    assert elsewhere() == [(0, ""), (0, "")], "the decoder has 12 s to do, and the other one less"


def test_a_lost_engine_s_pictures_go_on_from_their_last_hand_over() -> None:
    desk = Desk("low", "high", "decode")
    one = desk.submit("one", n=3)
    desk.hand_over(one, 0, step=2)
    desk.hand_over(one, 1, step=2)
    desk.hand_over(one, 1, step=4)
    desk.given()
    desk.members[1].health = Health.DOWN
    desk.ledger.begin_again(one, 1, suspect=True)
    desk.placing.place(one)
    assert desk.given() == [] and one.places[0].engine is None and one.strikes == 1, "none has its stage"
    assert [place.step for place in one.places] == [2, 4, 0] and one.places[1].engine == 2
    desk.members[1].health = Health.READY
    desk.placing.place(one)
    assert desk.given() == [(1, "one", [], [(0, 2)])]
    desk.ledger.begin_again(one, 0, suspect=False)
    desk.placing.place(one)
    assert desk.given() == [(0, "one", [2], [])] and one.strikes == 1


def test_what_an_engine_no_longer_has_is_not_taken_from_it() -> None:
    """Such as the last words of one that was given up."""
    desk = Desk("low", "high", "decode")
    one = desk.submit("one")
    desk.hand_over(one, 0, step=2)
    state = one.places[0].state
    assert state is not None and desk.ledger.handed_over(HandedOver("one", state), 0) is None
    assert one.places[0].engine == 1


def test_a_cancelled_request_is_forgotten_by_each_engine_that_has_some_of_it() -> None:
    desk = Desk("low", "high", "decode")
    one = desk.submit("one", n=2)
    desk.hand_over(one, 0, step=2)
    desk.given()
    desk.ledger.settle(one, deadline_error())
    assert [(member.index, command) for member, command in desk.placing.outbox] == [
        (0, Cancel("one")),
        (1, Cancel("one")),
    ]
    assert desk.admission.items == 0


def test_a_partial_picture_that_its_picture_has_passed_is_left_out() -> None:
    """Decoders are several: the one with the partial picture may be the slower."""
    desk = Desk("low", "high", "decode", "decode")
    one = desk.submit("one", n=2)
    desk.hand_over(one, 0, step=1, number=0)
    desk.hand_over(one, 1, step=1, number=0)
    for step in (2, 4):
        desk.hand_over(one, 0, step)
    desk.decode(one, 0)
    desk.decode(one, 0, number=0)
    desk.decode(one, 1, number=0)
    told = [(type(event), event.index) for event in desk.events if not isinstance(event, Failed | Advanced)]
    assert told == [(FinishedPicture, 0), (PartialPicture, 1)], "nothing of a picture behind its end"


@pytest.mark.parametrize(
    ("engines", "before", "share"),
    [
        (["all"] * 4, 36 / 4, 12 / 4),
        (["low", "high", "decode", "decode"], 12.0, 4.0),  # high: 3 x 4 s on one engine
        (["low+high", "decode"], 18.0, 6.0),  # decoding and the rest take the same
        (["low", "high+decode"], 30.0, 10.0),
        (["all", "decode"], 18.0, 6.0),  # decoding 3 x 6 s is shared by both: 18 s in all on the first
    ],
)
def test_what_goes_before_a_newcomer_is_that_of_the_stages_which_take_longest(
    engines: list[str], before: float, share: float
) -> None:
    desk = Desk(*engines)
    for name in ("a", "b", "c"):
        desk.submit(name)
    assert desk.placing.backlog(COSTS, CASCADE) == pytest.approx(before)
    assert desk.placing.share(COSTS, CASCADE) == pytest.approx(share)
