"""`rmd import`: published weights (a base, a student's network, LoRAs) into a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_SHOWN_KEYS = 20


def command(
    base: Annotated[str, typer.Option(help="A diffusers folder, a .safetensors file, or owner/name@revision.")],
    preset: Annotated[str, typer.Option(help="How the student is sampled, such as lcm-sdxl.")],
    out: Annotated[Path, typer.Option(help="The checkpoint folder to write, such as models/lcm.")],
    network: Annotated[
        Path | None, typer.Option(help="The student's network: a file, the index of its parts, or its folder.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="A LoRA, FILE or FILE:STRENGTH (by default its publication's), or a PEFT folder; may be given often."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="With a single file: a diffusers folder with tokenizers and configurations.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Where a preset fits two: wan-1.3b or wan-14b.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32, of networks written anew; by default as published."),
    ] = None,
    fold_guidance: Annotated[
        float | None,
        typer.Option(
            min=1, help="Of a UNet that takes its guidance as an input (LCM's): the one to fold in; 1 is none."
        ),
    ] = None,
    allow_unmatched: Annotated[
        bool, typer.Option("--allow-unmatched", help="Leave out what finds no place, and say so.")
    ] = False,
) -> None:
    """Merge published weights into a checkpoint folder that `rmd build`, `generate` and `serve` take.

    Every key of every file must find its place. LoRAs are added in float32 and rounded once. A run that was stopped
    goes on when it is given again.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    from rmd.dtypes import parse_dtype
    from rmd.published.gathering import ImportRequest
    from rmd.published.importing import import_model
    from rmd.published.strength import strength_of

    request = ImportRequest(
        base=base,
        preset=preset,
        out=out,
        network=network,
        loras=tuple(_strength(text) for text in lora or ()),
        config=config,
        backbone=backbone,
        dtype=None if dtype is None else parse_dtype(dtype, "cpu"),
        allow_unmatched=allow_unmatched,
        fold_guidance=fold_guidance,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("reading", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        imported = import_model(request, report, say=lambda text: typer.echo(text, err=True))
    for item in imported.record["imported"]["loras"]:
        typer.echo(f"LoRA {item['name']}: added to {item['parameters']} weights at {strength_of(item, preset)}")
    for key in imported.left_out[:_SHOWN_KEYS]:
        typer.echo(f"left out: {key}")
    if len(imported.left_out) > _SHOWN_KEYS:
        typer.echo(f"left out: {len(imported.left_out) - _SHOWN_KEYS} more, listed in cascade.json")
    typer.echo(str(imported.folder))


def _strength(text: str) -> tuple[Path, float | None]:
    """``FILE`` or ``FILE:STRENGTH``; a colon may be part of a name that exists."""
    import math

    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), None
    try:
        strength = float(number)
    except ValueError:
        return Path(text), None
    if not math.isfinite(strength):
        raise ValueError(f"--lora {text}: the strength must be a finite number, such as 0.8")
    return Path(name), strength
