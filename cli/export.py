"""`rmd export`: what a distillation learnt, as a LoRA that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    import torch

    from rmd.checkpoint import CheckpointFolder
    from rmd.published.exporting import ExportedLora

Format = Literal["diffusers", "kohya", "peft"]
_DEFAULT_RANK = 64
_PROMPTS = ("a red apple", "a house by the sea")


def command(
    checkpoint: Annotated[Path, typer.Option(help="The distilled checkpoint folder.")],
    lora: Annotated[Path, typer.Option(help="What to write: a .safetensors file, or a folder with --format peft.")],
    base: Annotated[
        str | None, typer.Option(help="What it is to be added to; by default the checkpoint's teacher.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the factors; 64 where --error does not choose it.")
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="The smallest rank whose layers have at most this relative error."),
    ] = None,
    format: Annotated[
        Format | None, typer.Option(help="diffusers, kohya (ComfyUI too) or peft; by default what diffusers reads.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32; float16 of a difference.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Draw this to compare; may be given often.")] = None,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Compare weights only.")] = False,
    device: Annotated[str, typer.Option(help="Where it is computed: cpu or cuda.")] = "cpu",
) -> None:
    """Write a checkpoint's adapters, or its whole difference against a base cut to a rank, as a LoRA.

    A run with lora_rank keeps its adapters in the checkpoint: without --base, --rank and --error they are written as
    they are. The relative error of every layer, of all weights and of pictures is printed.
    """
    from rmd.backbones.base import usable_device
    from rmd.checkpoint import CheckpointFolder
    from rmd.dtypes import parse_dtype
    from rmd.published.exporting import ADAPTERS, export_adapters

    if rank is not None and error is not None:
        raise ValueError("give --rank or --error, not both")
    if any(not text.strip() for text in prompt or ()):
        raise ValueError("--prompt is empty; leave it out, or say what to draw")
    usable_device(device)
    folder = CheckpointFolder.read(checkpoint)
    stored = None if dtype is None else parse_dtype(dtype, device)
    if base is None and rank is None and error is None and (folder.path / ADAPTERS).is_file():
        written = export_adapters(folder, lora, format, stored)
        typer.echo(f"{written.path}: {len(written.modules)} adapters, as they were trained")
        return
    teacher = base or folder.teacher_path
    if teacher is None:
        raise ValueError(f"{checkpoint} names no teacher: give --base, what the LoRA is to be added to")
    written = _difference(folder, lora, teacher, rank, error, format, stored, device)
    for name, value in sorted(written.errors.items(), key=lambda item: -item[1]):
        typer.echo(f"{value:8.4f}  {name}")
    if written.left_out:
        typer.echo(f"left at the base's: {len(written.left_out)} biases, norms and tables, which a LoRA cannot hold")
    for component, count in written.elsewhere.items():
        typer.echo(
            f"not in the LoRA: {component}, {count} of whose weights differ from the base's; the pictures are drawn "
            f"with the checkpoint's own, and whoever uses the LoRA needs that too"
        )
    used = next(iter(written.modules.values())).rank
    errors = f"relative error {written.layers_error:.4f}, of all parameters {written.error:.4f}"
    typer.echo(f"{written.path}: rank {used}, {len(written.modules)} layers, {errors}")
    if not no_pictures:
        from rmd.published.lora_pictures import picture_error

        typer.echo(f"pictures differ by {picture_error(folder, written, prompt or _PROMPTS, device):.4f} (RMS of 0..1)")


def _difference(
    checkpoint: CheckpointFolder,
    out: Path,
    base: Path | str,
    rank: int | None,
    error: float | None,
    layout: Format | None,
    dtype: torch.dtype | None,
    device: str,
) -> ExportedLora:
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from rmd.published.exporting import export_difference

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("reading", total=None)
        return export_difference(
            checkpoint,
            out,
            base,
            rank=rank or _DEFAULT_RANK,
            error=error,
            layout=layout,
            dtype=dtype or torch.float16,
            device=device,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
