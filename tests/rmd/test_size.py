"""Sizes as text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmd.size import Size

sides = st.integers(1, 10_000)


@settings(deadline=None, max_examples=50)
@given(sides, sides, st.integers(1, 200))
def test_text_round_trip(width: int, height: int, frames: int) -> None:
    size = Size(width, height, frames)
    assert Size.parse(str(size)) == size


def test_pictures_leave_the_frames_out() -> None:
    assert str(Size(128, 64)) == "128x64"
    assert str(Size(832, 480, 81)) == "832x480x81"
    assert Size(832, 480, 81).short_side == 480


@pytest.mark.parametrize("text", ["", "128", "128x", "axb", "128x128x", "128 x 128", "-1x4", "1x2x3x4"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
        Size.parse(text)


def test_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Size.parse("0x4")
