"""`rmd backbones list`: what each backbone is, from its public configuration, without any weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rmd.backbones.base import Backbone

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Backbones: the model families that can be distilled and served."""


@app.command("list")
def list_backbones(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the backbones: denoiser parameters, teacher schedule, guidance, cascade, tokens per stage.

    Networks are built on the meta device: full size, and no memory.
    """
    from rmd.backbones.registry import BACKBONES

    rows = [describe(_full_size(name)) for name in BACKBONES]
    if json:
        import json as json_module

        typer.echo(json_module.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("name", "denoiser", "teacher", "guidance", "cascade", "steps at sizes", "tokens per stage"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for row in rows:
        cascade, teacher = row["cascade"], row["teacher"]
        table.add_row(
            row["name"],
            f"{row['denoiser_parameters'] / 1e9:.2f} B",
            f"{teacher['steps']} steps, shift {teacher['flow_shift']:g}",
            f"{teacher['guidance_scale']:g}",
            cascade["schedule"],
            ", ".join(f"{step['timestep']}@{step['size']}" for step in cascade["steps"]),
            ", ".join(str(tokens) for tokens in row["tokens_per_stage"]),
        )
    Console(width=160).print(table)


def describe(backbone: Backbone) -> dict[str, Any]:
    """One backbone's facts, ready for JSON."""
    cascade = backbone.default_cascade()
    return {
        "name": backbone.name,
        "media": backbone.media,
        "prediction": backbone.prediction,
        "denoiser_parameters": backbone.denoiser_parameters(),
        "teacher": {
            "steps": backbone.teacher_steps,
            "guidance_scale": backbone.teacher_guidance,
            "flow_shift": backbone.flow_shift,
            "size": str(backbone.full_size),
        },
        "cascade": {
            "schedule": cascade.schedule_name,
            "steps": [
                {
                    "stage": step.stage,
                    "timestep": step.timestep,
                    "teacher_timestep": step.teacher_timestep,
                    "size": str(step.size),
                }
                for step in cascade.steps
            ],
        },
        "tokens_per_stage": list(backbone.tokens_per_stage(cascade)),
    }


def _full_size(name: str) -> Backbone:
    import torch

    from rmd.backbones.configs import published_config
    from rmd.backbones.registry import get_backbone

    return get_backbone(name).from_config(published_config(name, text=False), torch.bfloat16, "meta")
