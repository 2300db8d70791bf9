"""Whole replicas and stages apart on a virtual clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.serving.outcomes import whole_rate
from bench.serving.pool_live import STAGES_OF, pools_live_markdown
from bench.serving.pool_report import pool_markdown
from bench.serving.pool_study import PoolSettings, run_pool_study
from bench.serving.pools import (
    LAYOUTS,
    Layout,
    Link,
    best_ratio,
    most,
    one_off,
    pool_seconds,
    simulate_cluster,
)
from bench.serving.simulate import World, simulate
from bench.serving.tables import machine
from bench.serving.traces import Ask, make_trace
from rmd.size import Size
from server.core.stages import check_covered, parse_stages
from server.core.stations import StationKey

H200 = machine("h200")


@pytest.mark.parametrize("devices", [1, 3])
def test_whole_replicas_are_what_the_simulator_makes_of_them(devices: int) -> None:
    trace = make_trace("streamed", 7.0 * devices, 120, 5)
    cluster = simulate_cluster(H200, "stagewise", trace, LAYOUTS["whole"], [devices])
    assert cluster == simulate(H200, "stagewise", trace, World(devices=devices))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("mix", ["four", "streamed", "teachers"])
def test_every_request_ends_once_with_all_its_pictures(name: str, mix: str) -> None:
    layout = LAYOUTS[name]
    trace = make_trace(mix, 9.0, 60, 3, "bursts")
    run = simulate_cluster(H200, "stagewise", trace, layout, [2] * len(layout))
    assert [outcome.status for outcome in run.outcomes] == [200] * 60
    rows = {label: count.rows for label, count in run.batches.stations.items()}
    decoded = rows["decode 1024x1024"] + rows.get("decode 512x512", 0)
    pictures, partials = sum(ask.pictures for ask in trace), sum(ask.partial_images for ask in trace)
    assert pictures <= decoded <= pictures + partials and rows["encode"] == 60


def test_a_picture_alone_pays_for_each_way_between_pools() -> None:
    half, full = Size(512, 512), Size(1024, 1024)
    link = Link(bytes_per_second=1e6, seconds=0.5, latents={half: 1_000, full: 4_000}, text=10_000)
    ask = [Ask(0.0, "2+2", 7)]
    alone = simulate(H200, "stagewise", ask).outcomes[0].latency
    apart = simulate_cluster(H200, "stagewise", ask, LAYOUTS["low, high, decode"], [1, 1, 1], link)
    assert apart.outcomes[0].latency == pytest.approx(alone + 0.514 + 0.504)
    apart = simulate_cluster(H200, "stagewise", ask, LAYOUTS["text apart"], [1, 1], link)
    assert apart.outcomes[0].latency == pytest.approx(alone + 0.510)  # a seed has no latents to carry


@pytest.mark.parametrize("layout", [LAYOUTS["whole"], LAYOUTS["decode apart"]])
def test_the_saturation_of_one_station_is_arithmetic(layout: Layout) -> None:
    width, seconds, count = 4, 0.5, 3
    free = {key: dict.fromkeys(widths, 1e-7) for key, widths in H200.costs.items()}
    known = replace(H200, costs={**free, StationKey("decode", size=Size(1024, 1024)): {width: seconds}})
    devices = [1] * (len(layout) - 1) + [count]
    trace, link = make_trace("2+2", 1.0, 960, 0), Link(seconds=0.0)
    run = simulate_cluster(known, "dynamic:4:0", trace, layout, devices, link, clients=96)
    assert whole_rate(run.outcomes) == pytest.approx(count * width / seconds, rel=0.02)
    assert most(pool_seconds(known, "2+2", layout), devices) == pytest.approx(count * width / seconds, rel=1e-4)


def test_saturated_pools_come_near_their_slowest_ones_bound() -> None:
    layout, devices = LAYOUTS["decode apart"], (2, 2)
    bound = most(pool_seconds(H200, "2+2", layout), devices)
    trace = make_trace("2+2", 1.0, 400, 0)
    rate = whole_rate(simulate_cluster(H200, "stagewise", trace, layout, devices, clients=128).outcomes)
    assert 0.85 * bound < rate <= 1.001 * bound


def test_ratios() -> None:
    assert best_ratio([1.0, 3.0], 8) == (2, 6) and one_off((2, 6)) == [(1, 7), (3, 5)]
    assert one_off((1, 1)) == []
    every = [(a, b, 9 - a - b) for a in range(1, 8) for b in range(1, 9 - a)]
    seconds = [0.7, 1.9, 3.1]
    assert most(seconds, best_ratio(seconds, 9)) == max(most(seconds, each) for each in every)
    with pytest.raises(ValueError, match="2 devices for 3 pools"):
        best_ratio([1.0, 1.0, 1.0], 2)


def test_a_study_is_written() -> None:
    settings = PoolSettings(
        ("amx",), ("2+2", "mix:bursts"), gpus=(2,), many=(8,), loads=(0.5, 0.9), seeds=(5,), count=40, workers=1
    )
    content = run_pool_study(settings)
    carried = content["carried"]["amx"]["latents"]
    assert carried["256x256"] == 4 * carried["128x128"] and content["weights"]["amx"]["low"] > 0
    layouts = content["parts"][0]["layouts"]
    assert set(layouts) == set(LAYOUTS) - {"low, high, decode"}  # it needs three devices
    told = pool_markdown(content)
    assert "| 2+2 | 2 | decode apart | 1:1 |" in told and "| mix:bursts | 2 | whole | 2 |" in told
    with pytest.raises(ValueError, match="mix '3\\+1' is none of"):
        run_pool_study(replace(settings, mixes=("3+1",)))
    bound = next(row for row in content["bounds"] if row["gpus"] == 8 and row["layout"] == "decode apart")
    assert bound["one_off"][1] <= bound["best"] <= 1.0


def test_what_no_device_can_make_is_refused() -> None:
    ask, apart = [Ask(0.0, "2+2", 7)], LAYOUTS["decode apart"]
    for layout, devices, match in (
        (apart, [1, 0], "stage 'decode' has no device"),
        ((("text", "low", "high"),), [1], "no pool has stage 'decode'"),
        ((("text", "low", "high", "decode"), ("decode",)), [1, 1], "stage 'decode' is in 2 pools"),
        (apart, [1], "2 pools, and numbers of devices for 1"),
    ):
        with pytest.raises(ValueError, match=match):
            simulate_cluster(H200, "stagewise", ask, layout, devices)


def test_the_layouts_of_real_engines_are_those_that_are_simulated() -> None:
    for name, words in STAGES_OF.items():
        engines = [parse_stages(each) for each in words.split(",")]
        check_covered(engines)
        assert {frozenset(pool) - {"text"} for pool in LAYOUTS[name]} == set(engines)


def test_a_report_of_real_engines_sets_each_layout_against_whole_replicas() -> None:
    rates = {"whole": [4.0, 6.0], "low, high": [2.0, 3.0], "decode apart": [4.0, 6.0]}
    content = {
        "settings": {"mix": "2+2", "rounds": 2, "saturated": 96, "clients": 32},
        "rates": rates,
        "simulated": rates,
        "ratios": {name: [0.5, 0.4, 0.6] for name in rates},
        "simulated_ratios": dict.fromkeys(rates, 0.55),
    }
    lines = pools_live_markdown(content).splitlines()
    assert "| low, high | `low,high+decode` | 2.50 | 2.00, 3.00 | 2.50 | 0.50 (0.40 to 0.60) | 0.55 |" in lines
