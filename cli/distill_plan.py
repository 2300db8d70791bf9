"""`rmd distill --dry-run`: what a distillation would need, and a no where it cannot fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from training.distill.plan import Plan
    from training.distill.settings import DistillSettings


def print_plan(
    settings: DistillSettings,
    folder: Path | None,
    backbone: str | None,
    device: str,
    gpu_memory: float | None,
    gpus: int,
) -> None:
    """Print the plan of a run.

    Args:
        folder: the teacher's; by default the public model of `backbone` is planned from its configuration.
        gpu_memory: GB of each GPU; the device's own by default.
        gpus: how many.

    Raises:
        ValueError: neither folder nor backbone is given, or the run cannot fit; the message says what would.
    """
    import torch

    from training.distill.planning import device_memory, refuse_what_cannot_fit
    from training.distill.teacher import Teacher, published_teacher

    dtype = torch.float32 if settings.precision == "fp32" else torch.bfloat16
    if folder is not None:
        teacher = Teacher.open(folder, backbone, dtype, weights=False)
    elif backbone is not None:
        teacher = published_teacher(backbone, dtype)
    else:
        raise ValueError("--dry-run: give --teacher, or --backbone for the public model of that name")
    settings = settings.for_backbone(teacher.backbone.profile)
    room = gpu_memory * 1e9 if gpu_memory is not None else device_memory(device)
    kind = "cpu" if device == "cpu" and gpu_memory is None else "cuda"
    plan, refusal = refuse_what_cannot_fit(teacher, settings, room, processes=gpus, device=kind)
    typer.echo(describe(plan, room))
    if refusal:
        raise ValueError(refusal)


def describe(plan: Plan, room: float) -> str:
    """A plan as text."""
    from training.distill.plan import ASSUMED_TFLOPS, GB

    def table(title: str, parts: dict[str, int]) -> list[str]:
        rows = [f"  {name:<18}{size / GB:8.2f} GB" for name, size in parts.items() if size]
        return [f"{title}: {sum(parts.values()) / GB:.1f} GB", *rows]

    steps = ", ".join(f"{step.timestep}@{step.size}" for step in plan.cascade.steps)
    batches = plan.batches
    return "\n".join(
        [
            f"schedule {plan.cascade.schedule_name}: {steps}",
            "parameters: " + ", ".join(f"{name} {count / 1e9:.3f} B" for name, count in plan.parameters.items()),
            f"an update: {plan.processes} x {batches.count} micro-batches of {batches.size}",
            *table("memory of each GPU, training", dict(plan.training)),
            *table("memory of each GPU, encoding prompts", dict(plan.encoding)),
            *(table("main memory of each process", dict(plan.host)) if plan.host else []),
            f"there are {room / GB:.1f} GB",
            f"work: {plan.flop / 1e12:.3g} TFLOP an update; {plan.updates_an_hour():.3g} updates an hour at "
            f"{ASSUMED_TFLOPS:g} TFLOP/s a GPU (an estimate for an H100's kind; nothing was measured)",
        ]
    )
