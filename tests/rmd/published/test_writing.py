"""What is stored: the dtypes, and values that one of them does not hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rmd.published.files import ImportRefused
from tests.rmd.published.conftest import TinyFolder, save, weights

Import = Callable[..., Any]


def test_values_that_the_stored_dtype_does_not_hold(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    """They would be stored as infinity. The message names the file that brings them, and the way out."""
    state = weights(base("pixart") / "transformer")
    state["proj_out.weight"][0, 0] = 70_000
    network = save(tmp_path / "network.safetensors", state)
    factors = {"A": torch.ones(1, state["proj_out.weight"].shape[1]), "B": torch.ones(len(state["proj_out.weight"]), 1)}
    small = save(tmp_path / "small.safetensors", {f"proj_out.lora_{key}.weight": x for key, x in factors.items()})
    large = save(tmp_path / "large.safetensors", {f"proj_out.lora_{key}.weight": 300 * x for key, x in factors.items()})
    brought = r"network\.safetensors: tensor 'proj_out\.weight' holds .* not finite in float16 \(up to 70000, and "
    for loras in ((), ((small, 1.0), (large, 1.0))):
        with pytest.raises(
            ImportRefused, match=rf"{brought}float16 ends at 65504\); give --dtype bfloat16 or float32$"
        ):
            imported("pixart", network=network, loras=loras, dtype=torch.float16)
    added = r"large\.safetensors: tensor 'proj_out\.weight' with it added holds .* float32, or a smaller strength$"
    with pytest.raises(ImportRefused, match=added):
        imported("pixart", loras=((large, 1.0), (small, 1.0)), dtype=torch.float16)
    imported("pixart", network=network, loras=((small, -10_000.0),), dtype=torch.float16)  # the sum is held
    imported("pixart", network=network, dtype=torch.bfloat16)
    assert float(weights(tmp_path / "out" / "transformer")["proj_out.weight"].max()) == 70_144


def test_a_dtype_is_for_networks_that_are_written_anew(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    """A LoRA on the second text encoder alone: the first and the VAE are copied."""
    before = weights(base("sdxl") / "text_encoder_2")
    name = next(name for name in before if name.endswith("q_proj.weight"))
    rows, columns = before[name].shape
    factors = {"A": torch.ones(1, columns), "B": torch.ones(rows, 1)}
    module = f"text_encoder_2.{name.removesuffix('.weight')}"
    lora = save(tmp_path / "lora.safetensors", {f"{module}.lora_{key}.weight": x for key, x in factors.items()})
    imported("sdxl", loras=((lora, 1.0),), dtype=torch.float16)
    for component in ("unet", "text_encoder_2"):
        assert {value.dtype for value in weights(tmp_path / "out" / component).values()} == {torch.float16}
    for component in ("vae", "text_encoder"):
        for file in (base("sdxl") / component).glob("*.safetensors"):
            assert (tmp_path / "out" / component / file.name).read_bytes() == file.read_bytes()
