"""`rmd train-film-teacher`: train the embedded film teacher on encoded films, and export it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    films: Annotated[Path, typer.Option(help="Encoded films, as `rmd data --films` writes them.")] = Path("data/films"),
    run: Annotated[Path, typer.Option(help="The run's folder. An existing run is resumed.")] = Path("runs/films"),
    model: Annotated[Path, typer.Option(help="The embedded checkpoint that encoded the films.")] = Path(
        "models/embedded"
    ),
    initial: Annotated[Path, typer.Option(help="Start from this picture or film teacher.")] = Path(
        "models/embedded-teacher"
    ),
    picture_teacher: Annotated[
        Path | None, typer.Option(help="Whose pictures it goes on drawing; without: --initial's, if of pictures.")
    ] = None,
    picture_weight: Annotated[
        float, typer.Option(min=0, max=1, help="Share of --picture-teacher's weights in the start.")
    ] = 0.0,
    out: Annotated[Path, typer.Option(help="Where the finished teacher is exported.")] = Path(
        "models/embedded-video-teacher"
    ),
    minutes: Annotated[float, typer.Option(min=0.01, help="The budget, resumed runs included.")] = 120.0,
    batch: Annotated[int, typer.Option(min=1, help="Films a batch at 144 px.")] = 16,
    low_batch: Annotated[int, typer.Option(min=1, help="Films a batch at 96 px.")] = 48,
    picture_batch: Annotated[int, typer.Option(min=1, help="Single pictures a batch.")] = 64,
    full_share: Annotated[float, typer.Option(min=0, max=1, help="Share of batches at 144 px.")] = 0.25,
    picture_share: Annotated[float, typer.Option(min=0, max=1, help="Share of batches of single pictures.")] = 0.15,
    frame_share: Annotated[float, typer.Option(min=0, max=1, help="Share of batches of single frames of films.")] = 0.0,
    thin_share: Annotated[float, typer.Option(min=0, max=1, help="Share of film batches of five frames.")] = 0.6,
    muon_rate: Annotated[float, typer.Option(min=0, help="Muon's rate, for the blocks' matrices.")] = 1e-3,
    adam_rate: Annotated[float, typer.Option(min=0, help="AdamW's rate, for everything else.")] = 4e-4,
    cooldown_share: Annotated[float, typer.Option(min=0.01, max=1, help="Last share, where the rates fall.")] = 0.2,
    ema_decay: Annotated[float, typer.Option(min=0, max=0.99999, help="Of the averaged weights.")] = 0.998,
    save_minutes: Annotated[float, typer.Option(min=0.01, help="Time between states and exports.")] = 10.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own choice if left out.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of batches and noise.")] = 0,
) -> None:
    """Train the film teacher from the picture teacher within a time budget.

    A run that was stopped (Ctrl-C, SIGTERM, a crash) goes on from its last state when the command is given again.
    """
    from training.embedded.film_run import FilmRun
    from training.runtime.memory import keep_freed_memory

    keep_freed_memory(device)
    job = FilmRun(films, run, model, threads=threads, device=device, log=typer.echo)
    trainer = job.train(
        minutes=minutes,
        initial=initial,
        picture_teacher=picture_teacher,
        picture_weight=picture_weight,
        batch=batch,
        low_batch=low_batch,
        picture_batch=picture_batch,
        full_share=full_share,
        picture_share=picture_share,
        frame_share=frame_share,
        thin_share=thin_share,
        muon_rate=muon_rate,
        adam_rate=adam_rate,
        cooldown_share=cooldown_share,
        ema_decay=ema_decay,
        save_minutes=save_minutes,
        seed=seed,
    )
    if not trainer.finished:
        typer.echo(f"stopped and saved in {run} at step {trainer.step}; the same command goes on")
        return
    typer.echo(f"film teacher in {job.export(out)}")
