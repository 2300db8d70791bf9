"""The server's loop on a virtual clock."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench.serving.measures import Alone, best_rate, bootstrap, jain, percentile, summary
from bench.serving.outcomes import whole_rate
from bench.serving.report import study_markdown, write_report, write_study
from bench.serving.simulate import World, simulate
from bench.serving.study import StudySettings, run_study
from bench.serving.tables import MACHINES, filled, machine
from bench.serving.traces import Ask, make_trace


def test_a_picture_alone_takes_the_sum_of_its_batches() -> None:
    known = machine("h200")
    run = simulate(known, "stagewise", [Ask(1.0, "2+2", 7)])
    parts = {key.label: widths[1] for key, widths in known.costs.items() if 1 in widths}
    expected = parts["encode"] + 2 * parts["512x512"] + 2 * parts["1024x1024"] + parts["decode 1024x1024"]
    assert run.outcomes[0].latency == pytest.approx(expected) and run.outcomes[0].status == 200


def test_saturated_whole_requests_are_arithmetic() -> None:
    known = machine("h200")
    run = simulate(known, "dynamic:16:0", make_trace("2+2", 1.0, 640, 0), clients=64)
    batch = {key.label: widths.get(16, 0.0) for key, widths in known.costs.items()}
    seconds = batch["encode"] + 2 * batch["512x512"] + 2 * batch["1024x1024"] + batch["decode 1024x1024"]
    assert whole_rate(run.outcomes) == pytest.approx(16 / seconds, rel=0.01)
    assert run.busy == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", MACHINES)
def test_the_rule_is_level_at_saturation_and_ahead_at_a_middle_load(name: str) -> None:
    known, full, middle = machine(name), {}, {}
    for policy in ("stagewise", "dynamic:8:0"):
        full[policy] = whole_rate(simulate(known, policy, make_trace("mix", 1.0, 800, 5), clients=64).outcomes)
    for policy in full:
        run = simulate(known, policy, make_trace("mix", 0.7 * full["dynamic:8:0"], 800, 5))
        middle[policy] = summary([run], Alone(known))
    assert full["stagewise"] > 0.98 * full["dynamic:8:0"]
    assert middle["stagewise"]["p50"] < middle["dynamic:8:0"]["p50"]
    assert middle["stagewise"]["p99"] < middle["dynamic:8:0"]["p99"]


def test_two_devices_do_twice_the_work_and_an_idle_host_costs_its_time() -> None:
    known, trace = machine("amx"), make_trace("mix", 1.0, 600, 0)
    rates = {
        world: whole_rate(simulate(known, "stagewise", trace, world, clients=64).outcomes)
        for world in (World(), World(devices=2), World(batch_seconds=0.01), World(noise=0.2))
    }
    alone, two, slow, noisy = rates.values()
    assert two == pytest.approx(2 * alone, rel=0.05) and slow < 0.9 * alone and noisy == pytest.approx(alone, rel=0.05)


def test_tracks_are_for_crowds_and_make_as_much_by_batches_of_half_the_width() -> None:
    known, tracked = machine("avx2"), World(tracks=2)
    alone, trace = make_trace("2+2", 0.5, 40, 0), make_trace("2+2", 1.0, 400, 0)
    apart = [simulate(known, "stagewise", alone, world).outcomes for world in (World(), tracked)]
    assert [o.latency for o in apart[0]] == [o.latency for o in apart[1]], "a picture alone has the whole device"
    whole, halves = (simulate(known, "stagewise", trace, world, clients=32) for world in (World(), tracked))
    assert whole_rate(halves.outcomes) == pytest.approx(whole_rate(whole.outcomes), rel=0.03)
    assert halves.busy == pytest.approx(1.0, abs=0.03)
    widest = [max(rows for (label, rows) in run.batches.widths if label == "256x256") for run in (whole, halves)]
    assert widest == [8, 4]
    baseline = [simulate(known, "dynamic:8:0", trace, world, clients=32).outcomes for world in (World(), tracked)]
    assert whole_rate(baseline[0]) == whole_rate(baseline[1]), "other rules have none, as in the server"


def test_what_is_too_much_is_refused_and_what_is_late_is_given_up() -> None:
    world = World(queue_items=16, deadline_seconds=1.0)
    figures = summary(
        [simulate(machine("h200"), "fifo", make_trace("2+2", 40.0, 300, 0), world)], Alone(machine("h200"))
    )
    assert figures["refused"] > 0.5 and figures["late"] > 0.0
    assert figures["p99"] == math.inf and 0 < figures["goodput"] <= figures["pictures_per_second"]


def test_previews_come_before_their_pictures() -> None:
    run = simulate(machine("amx"), "stagewise", make_trace("streamed", 8.0, 200, 0))
    streamed = [outcome for outcome in run.outcomes if outcome.ask.partial_images]
    assert streamed and all(outcome.first_partial < outcome.finished for outcome in streamed)


def test_measures() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0 and math.isnan(percentile([], 0.5))
    assert jain([1.0, 1.0]) == 1.0 and jain([1.0, 0.0]) == 0.5
    assert best_rate(lambda rate: rate <= 3.0, 1.0, 9.0) == pytest.approx(3.0, rel=0.02)
    assert best_rate(lambda rate: False, 1.0, 9.0) == 0.0
    ratio, low, high = bootstrap([(2.0, 1.0), (2.2, 1.0), (1.8, 1.0)])
    assert ratio == pytest.approx(2.0) and low <= ratio <= high
    assert filled({1: 1.0, 4: 4.0}, (1, 2, 4)) == {1: 1.0, 2: 2.0, 4: 4.0}
    with pytest.raises(ValueError, match="h200"):
        machine("abacus")


def test_a_study_is_written(tmp_path: Path) -> None:
    settings = StudySettings(
        ("avx2",), ("2+2",), baselines=("dynamic:4:0",), loads=(0.7,), seeds=(0, 1), count=60, workers=1
    )
    content = run_study(settings)
    assert content["parts"][0]["claims"]["saturated"][3] == "dynamic:4:0"
    written = write_study(content, tmp_path)
    assert {path.suffix for path in written} >= {".json", ".md"} and "| avx2 | 2+2 |" in study_markdown(content)
    assert write_report({"x": math.nan}, "text", tmp_path, "odd")[0].read_text() == '{\n "x": null\n}\n'
