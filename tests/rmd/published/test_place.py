"""The folder that an import writes: who may read it, what it may replace, and what a stopped run leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.rmd.published.conftest import closed_to_others

Import = Callable[..., Any]


def test_a_services_own_user_may_read_an_import(imported: Import, tmp_path: Path) -> None:
    imported("sdxl")
    assert closed_to_others(tmp_path / "out") == []
