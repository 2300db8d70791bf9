"""A live run, rehearsed on an engine that only pretends."""

from __future__ import annotations

import pytest

from bench.serving.link import PretendedEngine
from bench.serving.live import LiveSettings, run_live
from bench.serving.report import live_markdown
from bench.serving.tables import machine


def test_a_live_run_is_what_the_simulator_says() -> None:
    settings = LiveSettings(
        baselines=("dynamic:4:0", "fifo"), mixes=("streamed",), loads=(0.6,), seeds=(0, 1), saturated=200, count=150
    )
    engine = PretendedEngine(machine("amx"))
    content = run_live(settings, engine, clock=engine.clock)
    assert "| `fifo` |" in live_markdown(content)
    (part,) = content["parts"]
    assert part["limits"]["stagewise"]["saturated"] > part["limits"]["fifo"]["saturated"]
    figures = part["loads"]["0.6"]["stagewise"]
    assert figures["pictures_per_second"] > 0 and figures["first_partial_p50"] < figures["p50"]
    assert part["claims"]["saturated"][3] in settings.baselines
    told = {(line["policy"], line["load"]): line for line in content["validation"]}
    real, simulated = told["stagewise", "saturated"]["rate"]
    assert simulated == pytest.approx(real, rel=0.03)
    for name in ("rate", "p50", "p99"):
        real, simulated = told["stagewise", "0.6"][name]
        assert simulated == pytest.approx(real, rel=0.1)
