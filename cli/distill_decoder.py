"""`rmd distill-decoder`: a checkpoint's own decoder into a small one, without pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.numbers import use_threads, whole_numbers


def command(
    checkpoint: Annotated[Path, typer.Option(help="The student's folder, whose own autoencoder is distilled.")] = Path(
        "models/embedded"
    ),
    out: Annotated[Path | None, typer.Option(help="The decoder's folder; <checkpoint>-decoder.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of latents, metrics and states; runs/<out's name>. Resumed.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file, one prompt a line; by default the training captions of --data.")
    ] = None,
    data: Annotated[Path, typer.Option(help="The cache folder that `rmd data` wrote.")] = Path("data"),
    samples: Annotated[int, typer.Option(min=1, help="The student's samples to train on; made once, and kept.")] = 4096,
    sample_batch: Annotated[int, typer.Option(min=1, help="Prompts sampled together.")] = 8,
    schedule: Annotated[str | None, typer.Option(help="That the student runs; the checkpoint's default.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Training time, resumed runs included.")] = None,
    iterations: Annotated[int | None, typer.Option(min=0, help="Updates; ends the run if it comes first.")] = None,
    blocks: Annotated[
        str | None, typer.Option(help="Residual blocks of each level, such as 3,3,3,1; by default what suits.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of every level; by default what suits.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures an update.")] = 16,
    crop: Annotated[
        int | None, typer.Option(min=4, help="Latent positions a side that an update sees; all by default.")
    ] = None,
    rate: Annotated[float, typer.Option(min=0, help="AdamW's rate.")] = 2e-3,
    pixel: Annotated[float, typer.Option(min=0, help="Weight of L1 on pixels and on their differences.")] = 1.0,
    perceptual: Annotated[float, typer.Option(min=0, help="Weight of EfficientNet-Lite0 features.")] = 0.0,
    perceptual_from: Annotated[
        float,
        typer.Option(min=0, max=0.99, help="Share of the run before that: on a CPU it costs five times the rest."),
    ] = 0.0,
    adversarial: Annotated[float, typer.Option(min=0, help="Weight of a patch discriminator.")] = 0.0,
    noise: Annotated[float, typer.Option(min=0, help="Largest noise of the samples' neighbours.")] = 0.15,
    low_share: Annotated[float, typer.Option(min=0, max=1, help="Share of batches at a lower stage's size.")] = 0.25,
    save_minutes: Annotated[float, typer.Option(min=0.01, help="Time between states.")] = 5.0,
    use: Annotated[
        bool, typer.Option("--use", help="Name it in the checkpoint's cascade.json: it decodes from then on.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own choice if left out.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of samples, batches and noise.")] = 0,
) -> None:
    """Distil a small decoder from a checkpoint's own, on the student's samples alone.

    A run that was stopped (Ctrl-C, SIGTERM, a crash) goes on from its last state when the command is given again.
    """
    from pydantic import ValidationError
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from rmd.backbones.decoders import default_shape
    from rmd.checkpoint import CheckpointFolder
    from training.decoder.run import DecoderRun, check_run
    from training.decoder.settings import DecoderSettings
    from training.runtime.memory import keep_freed_memory

    use_threads(threads)
    keep_freed_memory(device)
    usual_blocks, usual_width = default_shape(CheckpointFolder.read(checkpoint).backbone_name)
    try:
        settings = DecoderSettings(
            minutes=minutes,
            iterations=iterations,
            blocks=usual_blocks if blocks is None else whole_numbers("--blocks", blocks, least=0),
            width=width or usual_width,
            batch=batch,
            crop=crop,
            rate=rate,
            pixel=pixel,
            perceptual=perceptual,
            perceptual_from=perceptual_from,
            adversarial=adversarial,
            noise=noise,
            low_share=low_share,
            save_minutes=save_minutes,
            seed=seed,
        )
    except ValidationError as error:
        raise ValueError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from None
    out = out or checkpoint.with_name(f"{checkpoint.resolve().name}-decoder")
    run = run or Path("runs") / out.name
    check_run(out, settings)
    texts = _prompts(prompts, data, seed)
    job = DecoderRun(checkpoint, run, device)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("sampling", total=1.0)
        complete = job.make_latents(
            texts, samples, schedule=schedule, seed=seed, batch=sample_batch,
            progress=lambda done, total: bar.update(task, completed=done / total),
        )  # fmt: skip
        if not complete:
            typer.echo(f"stopped: the samples made so far are in {run}; the same command goes on")
            return
        task = bar.add_task("training", total=1.0)
        trainer = job.train(
            settings,
            lambda share, figures: bar.update(task, completed=share, description=f"loss {figures['loss']:.4f}"),
        )
    if not trainer.finished:
        typer.echo(f"stopped and saved in {run} at update {trainer.progress.iteration}; the same command goes on")
        return
    record = job.export(trainer, out, use)
    for size, entry in record["quality"].items():
        typer.echo(f"{size}: {entry['psnr']:.1f} dB from the full decoder's pictures")
    typer.echo(f"{record['seconds']['ratio']:.1f} times as fast; decoder in {out}")


def _prompts(file: Path | None, data: Path, seed: int) -> list[str]:
    from training.distill.prompt_files import caption_prompts, read_prompt_file

    return read_prompt_file(file) if file is not None else caption_prompts(data, seed)
