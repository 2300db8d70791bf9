"""`rmd train-teacher`: train the embedded autoencoder and teacher from the picture cache, and export them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    data: Annotated[Path, typer.Option(help="Picture cache, as `rmd data` writes it.")] = Path("data"),
    run: Annotated[
        Path, typer.Option(help="The run's folder: states, log, sheets. An existing run is resumed.")
    ] = Path("runs/teacher"),
    models: Annotated[Path, typer.Option(help="Where embedded/ and embedded-teacher/ are exported.")] = Path("models"),
    minutes: Annotated[float, typer.Option(min=0.01, help="The transformer's budget, resumed runs included.")] = 60.0,
    autoencoder_minutes: Annotated[float, typer.Option(min=0.01, help="The autoencoder's budget.")] = 14.0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a batch at the full size.")] = 32,
    low_batch: Annotated[int, typer.Option(min=1, help="Pictures a batch at the low size.")] = 128,
    low_share: Annotated[float, typer.Option(min=0, max=0.99, help="Share of the budget at the low size alone.")] = 0.5,
    low_every: Annotated[int, typer.Option(min=2, help="After that, every n-th batch is at the low size.")] = 3,
    muon_rate: Annotated[float, typer.Option(min=0, help="Muon's rate, for the blocks' matrices.")] = 1.5e-3,
    adam_rate: Annotated[float, typer.Option(min=0, help="AdamW's rate, for everything else.")] = 6e-4,
    save_minutes: Annotated[float, typer.Option(min=0.01, help="Time between states, exports and sheets.")] = 5.0,
    initial: Annotated[Path | None, typer.Option(help="Start from the transformer of this teacher's folder.")] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="MiniLM's folder; the installed package's if left out.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own choice if left out.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    cooldown_share: Annotated[float, typer.Option(min=0.01, max=1, help="Last share, where the rates fall.")] = 0.3,
    coloured: Annotated[float, typer.Option(min=0, max=1, help="Share of samples on a coloured ground.")] = 0.25,
    ema_decay: Annotated[float, typer.Option(min=0, max=0.99999, help="Of the averaged weights.")] = 0.9985,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the transformer's blocks.")] = False,
    sheets: Annotated[bool, typer.Option(help="Draw a contact sheet at every save.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
) -> None:
    """Train the embedded model's autoencoder (unless the run has one) and its teacher within a time budget.

    A run that was stopped (Ctrl-C, SIGTERM, a crash) goes on from its last state when the command is given again.
    """
    from training.embedded.data.dataset import PictureSet

    PictureSet.load(data)  # a missing cache is said before torch and diffusers are imported
    from training.embedded.teacher_run import TeacherRun
    from training.runtime.memory import keep_freed_memory

    keep_freed_memory(device)
    job = TeacherRun(
        data, run, models, text_encoder=text_encoder, threads=threads, device=device, sheets=sheets, log=typer.echo
    )
    job.prepare(autoencoder_minutes=autoencoder_minutes, initial=initial, seed=seed)
    trainer = job.train(
        minutes=minutes,
        batch=batch,
        low_batch=low_batch,
        low_share=low_share,
        low_every=low_every,
        initial=initial,
        muon_rate=muon_rate,
        adam_rate=adam_rate,
        save_minutes=save_minutes,
        cooldown_share=cooldown_share,
        coloured=coloured,
        ema_decay=ema_decay,
        compile=compile_,
        seed=seed,
    )
    if not trainer.finished:
        typer.echo(f"stopped and saved in {run} at step {trainer.step}; the same command goes on")
        return
    typer.echo(f"teacher in {job.export()}")
