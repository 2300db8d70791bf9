"""Traces: the same for every policy, and what their names say."""

from __future__ import annotations

import itertools
from statistics import fmean, pstdev

import pytest

from bench.serving.traces import ARRIVALS, MIXES, make_trace


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_a_trace_is_its_seeds_and_has_its_rate(arrivals: str) -> None:
    trace = make_trace("four", 6.0, 4000, 1, arrivals)
    assert trace == make_trace("four", 6.0, 4000, 1, arrivals) != make_trace("four", 6.0, 4000, 2, arrivals)
    pictures = sum(ask.pictures for ask in trace)
    nominal = 6.0 if arrivals != "ramp" else 4.5
    assert pictures / trace[-1].at == pytest.approx(nominal, rel=0.15)
    assert all(before.at <= after.at for before, after in itertools.pairwise(trace))


def test_another_rate_stretches_the_same_requests() -> None:
    slow, fast = make_trace("mix", 1.0, 50, 3), make_trace("mix", 2.0, 50, 3)
    assert [ask.at for ask in slow] == pytest.approx([2 * ask.at for ask in fast])
    assert [(ask.schedule, ask.seed) for ask in slow] == [(ask.schedule, ask.seed) for ask in fast]


def test_gaps_are_as_uneven_as_they_should_be() -> None:
    for arrivals, expected in (("poisson", 1.0), ("gamma", 3.0)):
        times = [ask.at for ask in make_trace("2+2", 1.0, 8000, 0, arrivals)]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert pstdev(gaps) / fmean(gaps) == pytest.approx(expected, rel=0.2)


def test_mixes_hold_their_shares_and_no_prompt_comes_twice() -> None:
    trace = make_trace("teachers", 1.0, 8000, 0)
    assert fmean(ask.schedule == "teacher" for ask in trace) == pytest.approx(0.03, abs=0.01)
    assert fmean(ask.partial_images for ask in make_trace("streamed", 1.0, 4000, 0)) == pytest.approx(0.5, abs=0.05)
    assert len({ask.prompt for ask in trace}) > 7990
    assert MIXES["four"].pictures == pytest.approx(1.9)
