"""Tiny folders, written once a test run, and the comparison with diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rmd.backbones.base import Backbone
from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import write_tiny_folder

TinyFolder = Callable[[str], Path]
TinyBackbone = Callable[[str], Backbone]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """name -> a tiny folder of that backbone; treat it as read-only."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_tiny_folder(name, tmp_path_factory.mktemp("tiny") / name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def tiny_backbone(tiny_folder: TinyFolder) -> TinyBackbone:
    """name -> the tiny backbone in float32, loaded once."""
    loaded: dict[str, Backbone] = {}

    def get(name: str) -> Backbone:
        if name not in loaded:
            loaded[name] = get_backbone(name).load(tiny_folder(name), dtype=torch.float32)
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Tensor, Tensor], None]:
    """Equal to 1e-4 of the larger of 1 and the reference's largest value."""

    def check(actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape
        assert torch.isfinite(actual).all()
        tolerance = 1e-4 * max(1.0, float(expected.abs().max()))
        assert float((actual - expected).abs().max()) <= tolerance

    return check
