"""Plans for the public models in full size, from their configurations alone: every key finds its place."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from rmd.backbones.configs import published_config
from rmd.backbones.registry import get_backbone
from rmd.published.factors import Factors
from rmd.published.lora import Lora
from rmd.published.lora_names import named
from rmd.published.merge import plan_merge
from rmd.published.naming import Names
from rmd.published.networks import Expected
from tests.rmd.published.conftest import save


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
    # What is written of all layers is read again, under every name.
    layers = tuple(matrices)
    made = {
        layer: Factors(*(state[f"lora_unet_{layer.replace('.', '_')}.lora_{part}.weight"] for part in ("down", "up")))
        for layer in layers
    }
    for layout in ("peft",) if name == "pixart" else ("diffusers", "kohya"):
        keys = named(made, layout, kind.profile, denoiser, config, layers)  # type: ignore[arg-type]
        assert len(keys) == len({key.lower() for key in keys})
        plan = plan_merge([Lora.open(save(tmp_path / f"{layout}.safetensors", keys))], names, {denoiser: shapes})
        assert not plan.unmatched, layout
        assert plan.changes[denoiser].keys() == {f"{module}.weight" for module in matrices}, layout
