"""What batches cost: widths that pay, and what is learnt of them."""

from __future__ import annotations

import random

import pytest

from server.core.costs import CostTable
from tests.server.core.desk import HIGH, LOW


@pytest.mark.parametrize(
    ("widths", "waiting", "expected"),
    [
        ({1: 1.0, 2: 1.05, 4: 1.1, 8: 1.2}, 8, 8),  # a launch-bound low stage: everything rides
        ({1: 1.0, 2: 1.05, 4: 1.1, 8: 1.2}, 3, 3),  # padded to 4, still the best
        ({1: 1.0, 2: 2.0, 4: 4.0}, 8, 1),  # a saturated high stage: one at a time
        ({1: 1.0, 2: 1.9, 4: 3.8}, 8, 2),  # 5 % more is worth having; 4 gives nothing beyond it
        ({1: 1.0, 2: 1.97, 4: 3.94}, 8, 1),  # 1.5 % is under the 2 % that width must pay
        ({1: 1.0, 2: 1.97, 4: 3.88}, 8, 4),  # 2 does not pay, 4 does
        ({1: 1.0, 8: 3.0}, 2, 1),  # two in a bucket of 8 would be slower than one after the other
        ({1: 1.0, 8: 3.0}, 4, 4),
        ({}, 5, 1),
    ],
)
def test_batches_are_as_wide_as_they_pay(widths: dict[int, float], waiting: int, expected: int) -> None:
    assert CostTable({LOW: widths}).best_count(LOW, [1] * waiting) == expected


def test_guided_entries_take_two_rows() -> None:
    table = CostTable({LOW: {1: 1.0, 2: 1.0, 4: 1.0}})
    assert table.best_count(LOW, [2, 2, 2]) == 2
    assert table.best_count(LOW, [2, 1, 1, 1]) == 3
    assert CostTable({LOW: {1: 1.0}}).best_count(LOW, [2, 2]) == 1, "wider than any bucket, still served"


def test_estimates_follow_what_the_machine_does() -> None:
    table = CostTable({LOW: {1: 0.1, 4: 0.2}, HIGH: {1: 0.5}})
    assert table.seconds(LOW, 3) == pytest.approx(0.2)
    assert table.seconds(LOW, 9) == pytest.approx(0.2 * 2 + 0.1)
    for _ in range(20):
        table.observe(LOW, 1, 0.3)
        table.observe(HIGH, 1, 1.5)
    assert table.seconds(LOW, 1) == pytest.approx(0.3, rel=0.01)
    assert table.seconds(LOW, 4) == pytest.approx(0.6, rel=0.01), "a busy neighbour slows every width"
    assert table.widest(LOW) == 4


def test_a_width_that_ran_in_a_bad_hour_is_not_ruled_out_by_one_that_runs_in_a_good_one() -> None:
    """It is not run again, so nothing else would bring it back."""
    table = CostTable({LOW: {4: 0.32, 8: 0.60}, HIGH: {1: 0.5}})
    for _ in range(20):
        table.observe(LOW, 8, 1.5 * 0.60)
        table.observe(HIGH, 1, 1.5 * 0.5)
    for _ in range(20):
        table.observe(LOW, 4, 0.32)
        table.observe(HIGH, 1, 0.5)
    assert table.seconds(LOW, 8) == pytest.approx(0.60, rel=0.02)
    counts = list[int]()
    for _ in range(300):
        counts.append(table.best_count(LOW, [1] * 8))
        table.observe(LOW, counts[-1], {4: 0.32, 8: 0.60}[counts[-1]])
    assert counts[-1] == 8


@pytest.mark.parametrize("hour", [15, 30, 60, 120])
def test_good_and_bad_hours_in_turn_do_not_choose_the_width(hour: int) -> None:
    """What ran in a bad one looked dear beside a narrower width from a good one, which ran until that was found out."""
    truth = {1: 0.09, 4: 0.36, 8: 0.60}
    for seed in range(3):
        chance, table, counts = random.Random(seed), CostTable({LOW: truth, HIGH: {1: 0.5}}), list[int]()
        for batch in range(1200):
            slow = (1.5 if batch // hour % 2 else 1.0) * chance.lognormvariate(0.0, 0.1)
            table.observe(HIGH, 1, slow * 0.5)
            counts.append(table.best_count(LOW, [1] * 8))
            table.observe(LOW, counts[-1], slow * truth[counts[-1]] * chance.lognormvariate(0.0, 0.05))
        assert counts.count(8) > 0.96 * len(counts)


def test_a_few_slow_batches_do_not_rule_out_a_width() -> None:
    table = CostTable({LOW: {4: 0.32, 8: 0.60}})
    for slow in (0.66, 1.9, 0.66):
        table.observe(LOW, 8, slow)
    assert table.best_count(LOW, [1] * 8) == 8


def test_each_width_is_learnt_for_itself() -> None:
    table = CostTable({LOW: {1: 0.1, 4: 0.2}})
    for _ in range(9):
        table.observe(LOW, 1, 0.1)
        table.observe(LOW, 3, 0.5)  # runs padded, at 4
    assert table.seconds(LOW, 1) == pytest.approx(0.1) and table.seconds(LOW, 4) == pytest.approx(0.5)
    assert table.best_count(LOW, [1] * 4) == 1
    assert table.table() == {LOW: {1: pytest.approx(0.1), 4: pytest.approx(0.5)}}


def test_one_stalled_batch_bends_no_estimate() -> None:
    table = CostTable({LOW: {1: 0.1}})
    table.observe(LOW, 1, 30.0)
    assert table.seconds(LOW, 1) == pytest.approx(0.1)
    for _ in range(20):
        table.observe(LOW, 1, 0.2)
    table.observe(LOW, 1, 30.0)
    assert table.seconds(LOW, 1) == pytest.approx(0.2)


def test_widths_that_ran_out_of_memory_are_not_asked_for_again() -> None:
    table = CostTable({LOW: {1: 1.0, 2: 1.05, 4: 1.1, 8: 1.2}})
    table.narrow(LOW, 5)
    assert table.widths(LOW) == (1, 2, 4) and table.best_count(LOW, [1] * 8) == 4
    table.narrow(LOW, 1)
    assert table.widths(LOW) == (1,), "the smallest stays: there is nothing else to try"
    table.observe(LOW, 4, 1.1)
    assert table.widths(LOW) == (1,), "a batch that was under way brings none back"


def test_a_station_that_runs_on_something_else_starts_anew() -> None:
    table = CostTable({LOW: {1: 1.0, 2: 1.9}, HIGH: {1: 2.0}})
    for _ in range(40):
        table.observe(LOW, 1, 3.0)
        table.observe(HIGH, 1, 4.0)
    table.replace(LOW, {1: 0.5, 8: 0.6})
    assert table.widths(LOW) == (1, 8)
    assert table.seconds(LOW, 1) == pytest.approx(0.5) and table.seconds(LOW, 8) == pytest.approx(0.6)
    for _ in range(9):
        table.observe(LOW, 1, 0.5)
    assert table.seconds(HIGH, 1) == pytest.approx(4.0), "others keep what they have learnt"


def test_the_first_timings_stay_for_what_may_not_hang_on_a_mood() -> None:
    table = CostTable({LOW: {1: 1.0, 4: 2.0}})
    for _ in range(9):
        table.observe(LOW, 4, 20.0)
    assert table.first(LOW, 3) == pytest.approx(1.5)
    assert table.shared(LOW, 3) == pytest.approx(min(3.0, 15.0))


def _count_widths(table: CostTable, truth: dict[int, float], batches: int) -> list[int]:
    """Serve two waiting pictures at a time; how many shared each batch."""
    counts = []
    for _ in range(batches):
        count = table.best_count(LOW, [1, 1])
        table.observe(LOW, count, truth[count])
        counts.append(count)
    return counts


def test_a_width_that_was_timed_in_a_bad_moment_is_found_again() -> None:
    """Five starts on one noisy machine gave five sets of widths, and each stayed until the next start."""
    counts = _count_widths(CostTable({LOW: {1: 0.1, 2: 0.22}}), {1: 0.1, 2: 0.11}, 600)
    first = counts.index(2)
    assert 50 < first < 250, "what looks a little worse is tried before long"
    assert counts[first:].count(1) < 5, "and believed at once: noise only ever adds"


def test_what_looks_bad_is_tried_seldom() -> None:
    costs = {width: 0.1 * width for width in (1, 2)} | {4: 0.8}
    table = CostTable({LOW: costs})
    counts = list[int]()
    for _ in range(4000):
        counts.append(table.best_count(LOW, [1] * 4))
        table.observe(LOW, counts[-1], costs[counts[-1]])
    assert 1 <= counts.count(4) <= 10


def test_a_width_that_was_timed_in_a_good_moment_is_dropped_again() -> None:
    """Even where there is always company, so that a picture is never alone by chance."""
    counts = _count_widths(CostTable({LOW: {1: 0.1, 2: 0.11}}), {1: 0.1, 2: 0.5}, 600)
    assert counts[:3] == [2] * 3 and counts[4:63] == [1] * 59


def test_luck_does_not_make_short_batches_look_cheap() -> None:
    """The quickest of few flatters what is noisier: one at a time was chosen though eight are 16 % cheaper a row."""
    shares = list[float]()
    for seed in range(5):
        chance = random.Random(seed)
        truth = {1: 0.050, 2: 0.094, 4: 0.184, 8: 0.345}
        table = CostTable({LOW: {1: 0.045, 2: 0.1, 4: 0.17, 8: 0.36}})
        counts = list[int]()
        for _ in range(1500):
            waiting = chance.choice([1, 2, 3, 4, 8, 8])
            count = table.best_count(LOW, [1] * waiting)
            width = next(width for width in truth if width >= count)
            spread = 0.5 / width**0.5  # whatever else the cores do is shared out over a longer batch
            table.observe(LOW, count, truth[width] * chance.lognormvariate(-(spread**2) / 2, spread))
            if waiting == 8:
                counts.append(count)
        shares.append(counts.count(8) / len(counts))
    assert min(shares) > 0.5, shares
