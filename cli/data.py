"""`rmd data`: fetch, render, caption and split the embedded model's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    root: Annotated[Path, typer.Option(help="Cache folder.")] = Path("data"),
    processes: Annotated[int, typer.Option(min=1, help="Rendering processes.")] = 2,
    gradients: Annotated[bool, typer.Option("--gradients", help="Add the Fluent set with gradients.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Render again even if the cache is whole.")] = False,
) -> None:
    """Fetch the picture packages (with `npm pack`), render them at 256 px, join them with labels and split them."""
    from collections import Counter

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from training.data.build import build_pictures
    from training.data.sources import DEFAULT_PACKAGES, FLUENT_GRADIENT

    console = Console()
    columns = (TextColumn("rendering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("rendering", total=None)
        pictures = build_pictures(
            root,
            (*DEFAULT_PACKAGES, FLUENT_GRADIENT) if gradients else DEFAULT_PACKAGES,
            processes=processes,
            force=force,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    counts = Counter((record.style, record.split) for record in pictures.records)
    for style in sorted({record.style for record in pictures.records}):
        sets = ", ".join(f"{split} {counts[style, split]}" for split in ("train", "unseen_pair", "unseen_concept"))
        console.print(f"{style}: {sets}")
    console.print(f"{len(pictures)} pictures in {root}; credits in {root / 'NOTICE'}")
