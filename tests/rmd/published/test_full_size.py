"""Plans for the public models in full size, from their configurations alone: every key finds its place."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from rmd.backbones.configs import published_config
from rmd.backbones.registry import get_backbone
from rmd.published.lora import Lora
from rmd.published.merge import plan_merge
from rmd.published.naming import Names
from rmd.published.networks import Expected
from tests.rmd.published.conftest import save
from tests.rmd.published.test_lora_merge import _sgm


@pytest.mark.parametrize("name", ["sdxl", "pixart", "sd3", "wan-14b"])
def test_a_lora_of_every_matrix_is_planned(name: str, tmp_path: Path) -> None:
    kind = get_backbone(name)
    denoiser = kind.denoiser_folder  # type: ignore[attr-defined]
    config = published_config(name, text=False)[denoiser]
    shapes = Expected.of(kind.components[denoiser], config).shapes  # type: ignore[attr-defined]
    matrices = {key.removesuffix(".weight"): shape for key, shape in shapes.items() if len(shape) > 1}
    matrices = {module: shape for module, shape in matrices.items() if f"{module}.weight" in shapes}
    assert len(matrices) > 250
    modules = {key.removesuffix(".weight").removesuffix(".bias") for key in shapes}
    assert max(Counter(module.replace(".", "_") for module in modules).values()) == 1

    def factors(module: str, shape: tuple[int, ...], flat: str) -> dict[str, torch.Tensor]:
        down, up = torch.zeros(1, *shape[1:], dtype=torch.bfloat16), torch.zeros(shape[0], 1, dtype=torch.bfloat16)
        return {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.ones(())}

    names = Names(denoiser, {denoiser: tuple(shapes)}, kind.profile, config)
    state = {}
    for module, shape in matrices.items():
        state |= factors(module, shape, f"lora_unet_{module.replace('.', '_')}")
    plan = plan_merge([Lora.open(save(tmp_path / "flat.safetensors", state))], names, {denoiser: shapes})
    assert not plan.unmatched
    assert plan.changes[denoiser].keys() == {f"{module}.weight" for module in matrices}
    if name != "sdxl":
        return
    # The names of SDXL's first code, as most of its LoRAs have them.
    inside = {module: shape for module, shape in matrices.items() if ".attentions." in module or ".resnets." in module}
    first = {_sgm(key, layers=2): value for key, value in state.items()}
    first = {
        key: value for key, value in first.items() if "input_blocks" in key or "output_blocks" in key or "middle" in key
    }
    assert len(first) == 3 * len(inside)
    plan = plan_merge([Lora.open(save(tmp_path / "first.safetensors", first))], names, {denoiser: shapes})
    assert not plan.unmatched
    assert plan.changes[denoiser].keys() == {f"{module}.weight" for module in inside}
