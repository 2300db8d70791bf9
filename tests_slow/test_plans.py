"""Every shipped configuration of a large backbone, planned at full size on the meta device; some minutes in all."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch

from training.distill.plan import GB, _held, size_of
from training.distill.planning import refuse_what_cannot_fit
from training.distill.roles import trainable_copy
from training.distill.settings import DistillSettings
from training.distill.teacher import Teacher, published_teacher

CONFIGS = Path(__file__).parents[1] / "training" / "configs"
FITS = {
    # How many GPUs of how many GB each is made for.
    "sdxl/rmd": (1, 80), "sdxl/rmd-sharded": (8, 80), "sdxl/rmd-lora": (1, 80), "sdxl/rmd-lora-24gb": (1, 24),
    "pixart/rmd": (1, 80), "pixart/rmd-sharded": (8, 80), "pixart/rmd-lora": (1, 80),
    "sd3/rmd": (1, 80), "sd3/rmd-sharded": (8, 80), "sd3/rmd-lora": (1, 80),
    "wan-1.3b/rmd": (1, 80), "wan-1.3b/rmd-sharded": (8, 80), "wan-1.3b/rmd-lora": (1, 80),
    "wan-14b/rmd-sharded": (8, 141), "wan-14b/rmd-lora": (1, 80),
}  # fmt: skip

TABLE = {
    # GB, by arithmetic: 34 bytes a parameter with both moments and the average on the device, 4 of gradients, text.
    "pixart": (21, 2, 9.5),
    "wan-1.3b": (48, 6, 11.4),
    "sd3": (76, 9, 11.2),
    "sdxl": (87, 10, 1.6),
    "wan-14b": (486, 57, 11.4),
}


@lru_cache
def public(name: str) -> Teacher:
    return published_teacher(name, torch.bfloat16)


@pytest.mark.parametrize("config", FITS)
def test_each_configuration_fits_what_it_is_made_for(config: str) -> None:
    count, memory = FITS[config]
    settings = DistillSettings.read(CONFIGS / f"{config}.yaml")
    assert settings.backbone == config.partition("/")[0]
    plan, refusal = refuse_what_cannot_fit(public(settings.backbone), settings, memory * GB, processes=count)
    print(f"{config}: {plan.needed / GB:.1f} GB, { ({k: round(v / GB, 1) for k, v in plan.training.items()}) }")
    assert not refusal, refusal


def test_whole_networks_that_are_too_large_are_refused() -> None:
    """SD3.5 and SDXL on one 80 GB GPU with both moments and the average; Wan-14B on eight that each hold it all."""
    for name, options, count in (
        ("sdxl", {"betas": (0.9, 0.95)}, 1),
        ("sd3", {"betas": (0.9, 0.95)}, 1),
        ("wan-14b", {"batch_size": 8}, 8),
    ):
        settings = DistillSettings(**{"micro_batch": 1, "gradient_checkpointing": True, **options})  # type: ignore[arg-type]
        _, refusal = refuse_what_cannot_fit(public(name), settings, 80 * GB, processes=count)
        assert "and there are 80.0" in refusal
    assert "sharding=true" in refusal


@pytest.mark.parametrize("name", TABLE)
def test_full_size_networks_hold_what_the_arithmetic_says(name: str) -> None:
    static, gradients, text = TABLE[name]
    modules = public(name).backbone.component_modules()
    teacher = modules["denoiser"].requires_grad_(False)
    settings = DistillSettings(betas=(0.9, 0.95))
    held = _held(teacher, trainable_copy(teacher, settings), settings, 1)
    encoders = sum(size_of(module) for part, module in modules.items() if part.startswith("text_encoder"))
    networks = held["teacher"] + held["student"] + held["fake score"]
    assert networks / GB == pytest.approx(static, abs=0.6)
    assert held["gradients"] / GB == pytest.approx(gradients, abs=0.6)
    assert encoders / GB == pytest.approx(text, abs=0.1)
