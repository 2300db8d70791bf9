"""Which shapes a whole difference may have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rmd.published.files import ImportRefused
from tests.rmd.published.conftest import TinyFolder, save, weights

Import = Callable[..., Any]


def test_a_difference_has_its_parameters_shape_but_for_last_ones(
    base: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    """A transposed one has as many numbers, each of them in the wrong place."""
    before = weights(base("sdxl") / "unet")
    linear = next(name for name in before if name.endswith("ff.net.2.weight"))
    conv = next(name for name in before if name.endswith("conv_shortcut.weight"))
    rows, columns = before[linear].shape
    assert rows != columns and before[conv].shape[2:] == (1, 1)

    def differences(name: str, **parts: torch.Tensor) -> tuple[tuple[Path, float], ...]:
        return ((save(tmp_path / f"{name}.safetensors", {f"unet.{by[key]}.diff": x for key, x in parts.items()}), 1.0),)

    by = {"linear": linear.removesuffix(".weight"), "conv": conv.removesuffix(".weight")}
    with pytest.raises(ImportRefused, match=rf"\[{columns}, {rows}\] do not fit the weight \[{rows}, {columns}\]"):
        imported("sdxl", loras=differences("transposed", linear=torch.randn(columns, rows)))
    flat = torch.randn(before[conv].shape[:2])
    square = torch.randn(rows, columns, 1, 1)
    imported("sdxl", loras=differences("ones", linear=square, conv=flat))
    after = weights(tmp_path / "out" / "unet")
    torch.testing.assert_close(after[linear], before[linear] + square[:, :, 0, 0])
    torch.testing.assert_close(after[conv], before[conv] + flat[:, :, None, None])
