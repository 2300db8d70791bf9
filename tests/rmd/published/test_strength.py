"""At which strength a LoRA is merged where nobody asks for one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig

from rmd.published.files import ImportRefused
from tests.rmd.published.conftest import TinyFolder, assert_equal_weights, random_lora, weights
from tests.rmd.published.test_lora_merge import ATTENTION, fused

Import = Callable[..., Any]


def test_a_lora_without_a_strength_takes_its_presets(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    """Hyper-SD's card merges its SD3 LoRAs at 0.125, by diffusers' `fuse_lora(lora_scale=0.125)`."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION)
    state = random_lora(SD3Transformer2DModel.from_pretrained(base("sd3") / "transformer"), config)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=settings
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    oracle = fused(StableDiffusion3Pipeline, base("sd3"), [(file, 0.125)], ["transformer"])["transformer"]

    options: dict[str, Any] = {"preset": "hyper-sd3-8-cfg"}
    done = imported("sd3", loras=((file, None),), **options)
    (recorded,) = done.record["imported"]["loras"]
    assert (recorded["strength"], recorded["strength_from"]) == (0.125, "preset")
    before = weights(base("sd3") / "transformer")
    assert_equal_weights(weights(tmp_path / "out" / "transformer"), oracle, before)
    stored = json.loads((tmp_path / "out" / "cascade.json").read_text())
    assert stored["distillation"]["imported"]["loras"] == [recorded]
    assert done.record["imported"]["student"] == {"source": "ByteDance/Hyper-SD", "licence": None}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "which is of `ByteDance/Hyper-SD` (licence, as it was read: not confirmed)" in card
    assert "LoRA at 0.125, as hyper-sd3-8-cfg is published (factors 0.25)" in card

    imported("sd3", loras=((file, 1.0),), **options)
    assert "LoRA at 1, while hyper-sd3-8-cfg is published at 0.125" in (tmp_path / "out" / "README.md").read_text()
    for more in ({"loras": ((file, None), (file, 0.5))}, {"loras": ((file, None),), "network": file / "none"}):
        with pytest.raises(ImportRefused, match=r"published with its LoRA at 0\.125, .* FILE:0\.125 the student's"):
            imported("sd3", **options, **more)
    other = imported("sd3", loras=((file, None), (file, 0.5)), preset="sd3").record["imported"]["loras"]
    assert [(lora["strength"], lora["strength_from"]) for lora in other] == [(1.0, "default"), (0.5, "option")]
