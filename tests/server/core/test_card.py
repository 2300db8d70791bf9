"""What a schedule costs, and which of its steps are shown."""

from __future__ import annotations

import pytest

from rmd.cascade import Cascade
from rmd.presets import preset
from server.core.card import TeacherBaseline, partial_steps, step_costs
from server.core.costs import CostTable
from server.core.stations import STUDENT, TEACHER
from tests.server.core.desk import CARD, COSTS, FULL_SIZE, LOW, SCHEDULES


@pytest.mark.parametrize(
    ("schedule", "wanted", "expected"),
    [
        ("2+2", 0, ()),
        ("2+2", 1, (1,)),
        ("2+2", 3, (1,)),
        ("0+4", 1, (1,)),
        ("0+4", 2, (1, 2)),
        ("0+4", 3, (0, 1, 2)),
        ("1+3", 2, (0,)),
    ],
)
def test_partial_pictures_come_at_stage_ends(schedule: str, wanted: int, expected: tuple[int, ...]) -> None:
    assert partial_steps(preset("embedded", schedule=schedule), wanted) == expected


@pytest.mark.parametrize("steps", range(1, 60))
def test_as_many_partial_pictures_are_shown_as_were_asked_for(steps: int) -> None:
    times = [1000 - 10 * k for k in range(steps)]
    cascade = Cascade.from_steps("one stage", times, [FULL_SIZE] * steps)
    for wanted in (1, 2, 3):
        shown = partial_steps(cascade, wanted)
        assert len(set(shown)) == len(shown) == min(wanted, steps - 1)
        assert list(shown) == sorted(shown) and all(0 <= step < steps - 1 for step in shown)


def test_a_picture_costs_its_steps_and_its_decoding() -> None:
    costs = step_costs(CostTable(COSTS), SCHEDULES["2+2"].cascade, STUDENT)
    assert costs == pytest.approx((0.5, 0.4, 0.3, 0.2, 0.1))
    guided = step_costs(CostTable(COSTS), SCHEDULES["teacher"].cascade, TEACHER)
    assert guided[0] == pytest.approx(6 * 0.2 + 0.1), "two rows a step"


def test_previews_are_paid_for() -> None:
    plain = step_costs(CostTable(COSTS), SCHEDULES["0+4"].cascade, STUDENT)
    shown = step_costs(CostTable(COSTS), SCHEDULES["0+4"].cascade, STUDENT, partial_images=3)
    assert shown == pytest.approx(tuple(p + 0.1 * left for p, left in zip(plain, (3, 2, 1, 0, 0), strict=True)))


def test_costs_in_the_best_company_and_at_first() -> None:
    table = CostTable(COSTS)
    for _ in range(9):
        table.observe(LOW, 8, 0.8)
    cascade = SCHEDULES["2+2"].cascade
    decode = 0.12 / 8
    first = step_costs(table, cascade, STUDENT, how="first")[0]
    assert first == pytest.approx(2 * 0.12 / 8 + 2 * 0.1 + decode)
    assert step_costs(table, cascade, STUDENT, how="shared")[0] > first


def test_a_ratio_to_an_unsteady_baseline_is_withheld() -> None:
    from dataclasses import replace

    steady = TeacherBaseline("compiled", 10, 1.0, 0.5, 0.5, spread=1.1)
    moody = TeacherBaseline("eager", 10, 2.0, 0.5, 0.5, spread=3.0)
    card = replace(CARD, baselines=(steady, moody))
    assert card.speedups(0.5) == {"compiled": pytest.approx(22.0)}
    assert card.speedups(0.0) == {}
