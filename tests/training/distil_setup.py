"""A tiny real network (SD3Transformer2DModel, 8x8 latents) with everything that distillation needs around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rmd.backbones.embedded import EmbeddedBackbone
from rmd.cascade import Cascade
from rmd.noise_schedule import RectifiedFlow
from rmd.size import Size
from training.distill.methods import METHODS
from training.distill.methods.base import CleanSamples, DistributionMatching
from training.distill.prompts import PromptSet
from training.distill.roles import Networks
from training.distill.settings import DistillSettings
from training.distill.trainer import Hooks, Trainer

LOW, FULL = Size(32, 32), Size(64, 64)
TRANSFORMER: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 8, "out_channels": 8, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
}  # fmt: skip


def tiny_backbone(dtype: torch.dtype = torch.float32) -> EmbeddedBackbone:
    return EmbeddedBackbone.from_config({"transformer": TRANSFORMER, "scheduler": {}}, dtype=dtype)


def prompt_set(count: int = 5) -> PromptSet:
    generator = torch.Generator().manual_seed(3)

    def conditions(rows: int) -> dict[str, torch.Tensor]:
        return {
            "encoder_hidden_states": torch.randn(rows, 24, 16, generator=generator),
            "pooled_projections": torch.randn(rows, 16, generator=generator),
        }

    return PromptSet([f"prompt {i}" for i in range(count)], conditions(count), conditions(1))


def cascade_for(method: str) -> Cascade:
    times = [1000, 750, 500, 250]
    if method in ("rmd", "naive"):
        return Cascade.from_thresholds("tiny", RectifiedFlow(), (LOW, FULL), times, (-1.5,))
    if method == "swd":
        sizes = [LOW, LOW, Size(48, 48), FULL]
        return Cascade.from_steps("tiny", times, sizes, resolution_map="none")
    return Cascade.from_steps("tiny", times, [FULL] * 4)


def settings_for(method: str = "rmd", **options: Any) -> DistillSettings:
    defaults: dict[str, Any] = {
        "method": method, "batch_size": 4, "iterations": 4, "precision": "fp32", "generator_rate": 1e-3,
        "fake_rate": 1e-3, "low_stage_iterations": 0, "guidance_scale": 2.0, "log_every": 1, "sheet_every": 0,
        "save_every": 100,
    }  # fmt: skip
    return DistillSettings(**{**defaults, **options})


def make_method(settings: DistillSettings, backbone: EmbeddedBackbone | None = None) -> DistributionMatching:
    return METHODS[settings.method](
        backbone or tiny_backbone(), cascade_for(settings.method), settings, prompt_set(), 2.0
    )


def attach_samples(method: DistributionMatching, networks: Networks) -> None:
    """Give SwD, or DMD2 with its GAN loss, the clean samples that it trains on."""
    generator = torch.Generator().manual_seed(9)
    latents = {
        size: torch.randn(6, *method.backbone.latent_shape(size), generator=generator) for size in method.sample_sizes
    }
    method.attach(networks.fake, CleanSamples(latents, torch.arange(6) % 5))


def make_trainer(
    run: Path, hooks: Hooks | None = None, accelerator: Accelerator | None = None, **options: Any
) -> Trainer:
    settings = settings_for(**options)
    dtype = torch.float32 if settings.precision == "fp32" else torch.bfloat16
    backbone = tiny_backbone(dtype)
    method = make_method(settings, backbone)
    networks = Networks.build(backbone, settings)
    if method.needs_samples:
        attach_samples(method, networks)
    return Trainer(method, networks, settings, run, hooks=hooks, accelerator=accelerator)
