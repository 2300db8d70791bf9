"""The batch does not change a bit of a row: what tests/engines/test_engines.py leaves out for its minutes of g++."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.rows import check_rows


@pytest.mark.parametrize(("component", "own"), [("denoiser", False), ("text_encoder", False), ("decoder", True)])
def test_the_batch_does_not_change_a_bit_of_a_row(
    tmp_path: Path, component: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_rows(tmp_path, component, own, monkeypatch)
