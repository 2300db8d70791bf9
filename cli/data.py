"""`rmd data`: fetch, render, caption and split the embedded model's pictures; make films of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from training.embedded.data.dataset import PictureSet


def command(
    root: Annotated[Path, typer.Option(help="Cache folder.")] = Path("data"),
    processes: Annotated[int, typer.Option(min=1, help="Rendering processes.")] = 2,
    gradients: Annotated[bool, typer.Option("--gradients", help="Add the Fluent set with gradients.")] = False,
    films: Annotated[int, typer.Option(min=0, help="Make and encode this many films, too.")] = 0,
    film_pictures: Annotated[int, typer.Option(min=1, help="With --films: encoded single pictures.")] = 9000,
    film_root: Annotated[Path | None, typer.Option(help="With --films: their folder; <root>/films.")] = None,
    model: Annotated[Path, typer.Option(help="With --films: whose autoencoder and text encoder.")] = Path(
        "models/embedded"
    ),
    force: Annotated[bool, typer.Option("--force", help="Render again even if the cache is whole.")] = False,
) -> None:
    """Fetch the picture packages (with `npm pack`), render them at 256 px, join them with labels and split them.

    With --films, move them by rule and encode the films for `rmd train-film-teacher`: synthetic, exactly captioned. A
    run that was stopped goes on, and one that asks for more adds them.
    """
    from collections import Counter

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from training.embedded.data.build import build_pictures
    from training.embedded.data.sources import DEFAULT_PACKAGES, FLUENT_GRADIENT

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
    if films:
        _films(pictures, film_root or root / "films", model, films, film_pictures, console)


def _films(pictures: PictureSet, folder: Path, model: Path, films: int, singles: int, console: Console) -> None:
    """Renders and encodes the training films; SIGTERM and Ctrl-C end it after the shard it is at."""
    import threading

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from training.embedded.data.films import FilmSource
    from training.embedded.film_latents import FilmEncoder, write_prompts, write_shards
    from training.runtime.interrupts import stopped_by_signals
    from training.runtime.memory import keep_freed_memory

    keep_freed_memory("cpu")
    encoder = FilmEncoder(model)
    source = FilmSource(pictures, fits=encoder.fits)
    stop = threading.Event()
    columns = (TextColumn("films"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with stopped_by_signals(stop.set), Progress(*columns, console=console) as bar:
        task = bar.add_task("films", total=None)
        write_shards(
            folder,
            source,
            encoder,
            films=films,
            pictures=singles,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            stopped=stop.is_set,
        )
    captions = write_prompts(folder)
    console.print(f"{captions} captions in {folder / 'prompts.txt'}, for `rmd distill --prompts`")
    console.print("stopped; the same command goes on" if stop.is_set() else f"films in {folder}")
