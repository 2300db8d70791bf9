"""`rmd study`: a blind page of two models' pictures or films, and what its answers say."""

from __future__ import annotations

import json
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
)
from cli.groups import DefaultCommand
from cli.numbers import whole_numbers
from cli.options import DecoderOption
from cli.progress import progress_bar

app = typer.Typer(cls=DefaultCommand, add_completion=False, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Let readers compare two models blindly. Without a command's name: page."""


@app.command()
def page(
    sources: Annotated[list[Path], typer.Argument(help="Two: checkpoints or folders of files.")],
    prompts: PromptsOption,
    out: Annotated[Path, typer.Option(help="Folder of study.html, for readers, and key.json, not for them.")],
    trials: Annotated[
        int | None, typer.Option(min=1, help="How many prompts, chosen at random; all if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice and order of prompts and of the sides.")] = 0,
    schedule: SchedulesOption = None,
    seeds: SeedsOption = "0",
    cache: CacheOption = Path("runs/evaluate/drawn"),
    engines: EnginesOption = None,
    decoder: DecoderOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    batch: BatchOption = 4,
) -> None:
    """Write the page and its key. One checkpoint with two --schedule compares these."""
    from training.distill.prompt_files import read_prompt_file
    from training.evaluate.study.page import KEY, PAGE, make_study

    texts = read_prompt_file(prompts)
    runtime = Runtime(engines, decoder, device, dtype)
    drawn = Drawn(runtime, whole_numbers("--seeds", seeds, least=0), cache, schedule or (), batch)
    with progress_bar() as show:
        found = drawn.sources(sources, texts, None, show)
    if len(found) != 2:
        raise ValueError(f"a study compares two; these are {len(found)}: {', '.join(one.name for one in found)}")
    make_study(found[0], found[1], texts, out, trials=trials, seed=seed)
    typer.echo(f"{out / PAGE}: for readers; it works without a network")
    typer.echo(f"{out / KEY}: for `rmd study report`; keep it from readers")


@app.command()
def report(
    answers: Annotated[list[Path], typer.Argument(help="CSV files that the page saved.")],
    key: Annotated[Path, typer.Option(help="The study's key.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Counts, a two-sided binomial test and an exact interval."""
    from training.evaluate.study.answers import read_answers, read_key, study_markdown, study_report

    record = read_key(key)
    found = study_report(read_answers(answers, record), record)
    typer.echo(json.dumps(found, indent=1) if as_json else study_markdown(found), nl=as_json)
