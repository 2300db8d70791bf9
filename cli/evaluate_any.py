"""`rmd evaluate pictures` and `rmd evaluate films`: any model, by the metrics and for the benchmarks of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.drawn import (
    BatchOption,
    CacheOption,
    DeviceOption,
    Drawn,
    DtypeOption,
    EnginesOption,
    PromptsOption,
    Runtime,
    SchedulesOption,
    SeedsOption,
    writer,
)
from cli.numbers import whole_numbers
from cli.options import DecoderOption
from cli.progress import progress_bar


def pictures(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Checkpoints, folders of pictures (0/00000.png or 00000.png); the first is the reference."),
    ],
    prompts: PromptsOption,
    weights: Annotated[
        Path, typer.Option(help="Folder of the metrics' weights: hps, aesthetic, clip; what is absent is said.")
    ] = Path("models/metrics"),
    out: Annotated[Path, typer.Option(help="Folder of pictures.json and pictures.md.")] = Path("benchmarks/pictures"),
    schedule: SchedulesOption = None,
    seeds: SeedsOption = "0,1,2",
    cache: CacheOption = Path("runs/evaluate/drawn"),
    engines: EnginesOption = None,
    decoder: DecoderOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    batch: BatchOption = 4,
) -> None:
    """HPS v2.1, aesthetic score and CLIP score of any model's pictures, with intervals and paired differences."""
    from training.distill.prompt_files import read_prompt_file
    from training.evaluate.pictures.run import available, evaluate_pictures

    texts = read_prompt_file(prompts)
    available(weights)  # before anything is drawn
    runtime = Runtime(engines, decoder, device, dtype)
    drawn = Drawn(runtime, whole_numbers("--seeds", seeds, least=0), cache, schedule or (), batch)
    with progress_bar() as show:
        found = drawn.sources(sources, texts, "image", show)
        evaluate_pictures(found, texts, weights, out, device, progress=show)
    typer.echo((out / "pictures.md").read_text(encoding="utf-8"))


def films(
    prompts: Annotated[Path, typer.Option(help="The benchmark's prompts file, or its folder of them.")],
    layout: Annotated[str, typer.Option(help="vbench, or compbench: T2V-CompBench.")],
    out: Annotated[Path, typer.Option(help="Folder of the films, one folder a prompts file.")],
    checkpoint: Annotated[Path, typer.Option(help="A film checkpoint, or owner/name@revision.")] = Path(
        "models/embedded-video"
    ),
    schedule: Annotated[str | None, typer.Option(help="The checkpoint's, or 'teacher'.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Sampling seed of a prompt's first film; the next count up.")] = 0,
    engines: EnginesOption = None,
    decoder: DecoderOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    batch: BatchOption = 1,
) -> None:
    """Draw a benchmark's films, named and laid out so that its own scripts run on them."""
    from rmd.published.hub import checkpoint_folder
    from training.evaluate.films.layouts import next_commands
    from training.evaluate.films.run import draw_films, prompt_files

    files = prompt_files(prompts)
    pipe = Runtime(engines, decoder, device, dtype).pipeline(checkpoint_folder(checkpoint))
    name = schedule or pipe.checkpoint.default
    with progress_bar() as show:
        folders = draw_films(pipe, name, layout, files, out, writer(pipe), first_seed=seed, batch=batch, progress=show)
    typer.echo("Measure them with the benchmark's own scripts:")
    for line in next_commands(layout, out, folders):
        typer.echo(line)
