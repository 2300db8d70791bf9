"""Whether a distillation fits its GPUs, and which settings would make it fit."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from rmd.backbones.base import usable_device
from training.distill.plan import GB, Plan, make_plan
from training.distill.settings import DistillSettings
from training.distill.teacher import Teacher, training_cascade


def device_memory(device: str) -> float:
    """Bytes of the device's memory; main memory that is free where there is no GPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return float(psutil.virtual_memory().available)
    place = usable_device("cuda" if device == "auto" else device)
    return float(torch.cuda.get_device_properties(place).total_memory)


def refuse_what_cannot_fit(
    teacher: Teacher, settings: DistillSettings, room: float, *, processes: int = 1, device: str = "cuda"
) -> tuple[Plan, str]:
    """The plan of a run, and why it is refused; empty where it fits.

    Args:
        teacher: on the meta device.
        room: bytes of each GPU.
        processes: GPUs.
        device: "cuda" or "cpu".

    Raises:
        ValueError: the settings do not fit the teacher or the number of processes.
    """
    cascade = training_cascade(teacher, settings)
    scale = settings.guidance_scale if settings.guidance_scale is not None else teacher.guidance_scale

    def planned(chosen: DistillSettings) -> Plan:
        return make_plan(teacher.backbone, cascade, chosen, processes=processes, guidance_scale=scale, device=device)

    def fits(changes: dict[str, Any]) -> bool:
        return planned(settings.model_copy(update=changes)).needed <= room

    plan = planned(settings)
    if plan.needed <= room:
        return plan, ""
    needs = f"this run needs {plan.needed / GB:.1f} GB of each GPU, and there are {room / GB:.1f}"
    cures = _cures(settings, plan, cascade.num_steps, processes)
    changes: dict[str, Any] = {name: value for cure in cures for name, value in cure.items()}
    # Each lowers the need, and a plan of a large network takes long: where all together do not fit, no fewer do.
    if changes and fits(changes):
        changes = {}
        for cure in cures:
            changes |= cure
            if fits(changes):
                break
        return plan, f"{needs}; it fits with {_flags(changes)}"
    lora = {"lora_rank": 64, "gradient_checkpointing": True, "micro_batch": _least(settings, cascade.num_steps)}
    if not settings.lora_rank and fits({**lora, "sharding": False}):
        return plan, f"{needs}; trained whole it does not fit, as a LoRA it does: {_flags(lora)}"
    return plan, f"{needs}, which no setting brings it under: use larger GPUs, or more of them with --set sharding=true"


def _cures(settings: DistillSettings, plan: Plan, steps: int, processes: int) -> list[dict[str, Any]]:
    """Settings that save memory, those that cost least first; each is tried with all before it."""
    cures: list[dict[str, Any]] = []
    if not settings.gradient_checkpointing:
        cures.append({"gradient_checkpointing": True})
    size, least = plan.batches.size, _least(settings, steps)
    while size % 2 == 0 and size // 2 >= least:
        size //= 2
        cures.append({"micro_batch": size})
    if not settings.ema_on_cpu:
        cures.append({"ema_on_cpu": True})
    if processes > 1 and not (settings.sharding or settings.lora_rank):
        cures.append({"sharding": True})
    elif settings.second_moment == "float32" and not settings.betas[0] and not settings.sharding:
        cures.append({"second_moment": "8bit"})
    if not settings.offload_activations:
        cures.append({"offload_activations": True})
    return cures


def _least(settings: DistillSettings, steps: int) -> int:
    return steps if settings.rollout == "pipelined" else 1


def _flags(changes: dict[str, Any]) -> str:
    return " ".join(f"--set {name}={str(value).lower()}" for name, value in changes.items())
