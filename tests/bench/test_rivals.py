"""The outside server, set up by somebody who wants it to win."""

from __future__ import annotations

from bench.serving.rivals import best_setting


def test_its_window_is_the_shortest_of_those_that_saturate_alike() -> None:
    """Twenty milliseconds of waiting are no gain where nothing is gained by them."""
    assert best_setting({"8:0": 7.10, "8:0.02": 7.16, "4:0": 6.61, "4:0.02": 6.96}) == "8:0"
    assert best_setting({"8:0": 6.0, "8:0.02": 7.16, "4:0": 5.9, "4:0.02": 7.1}) == "8:0.02"
