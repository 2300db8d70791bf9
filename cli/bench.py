"""`rmd bench`: speed-ups of cascades over their teacher, and of engines over eager."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.numbers import buckets_option, use_threads, whole_numbers

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Measure speed-ups and engines, side by side in one run."""


@app.command()
def speedup(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backbone: Annotated[
        str | None, typer.Option(help="Random weights of sdxl, pixart, sd3, wan-1.3b, wan-14b or embedded.")
    ] = None,
    checkpoint: Annotated[Path, typer.Option(help="Measured unless --backbone or --random-weights is given.")] = Path(
        "models/embedded"
    ),
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="The embedded model's networks without its weights.")
    ] = False,
    engines: Annotated[
        Path | None, typer.Option(help="Built engines of the checkpoint, measured as well; engines-cache if complete.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Of those engines.")] = "auto",
    buckets: Annotated[str | None, typer.Option(help="Of those engines, as they were built.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the networks; auto: the device's own.")] = "auto",
    scale: Annotated[str, typer.Option(help="full, or tiny: a rehearsal of the same path.")] = "full",
    batches: Annotated[str, typer.Option(help="Pictures at a time, comma-separated.")] = "1,8",
    variants: Annotated[
        str | None, typer.Option(help="eager, compiled, inductor, tensorrt, each also +graphs; comma-separated.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds at most.")] = 7,
    whole_limit: Annotated[float, typer.Option(help="Schedules of fewer seconds are run whole.")] = 20.0,
    minutes: Annotated[float, typer.Option(help="Begin nothing new after this long.")] = 30.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    stock: Annotated[bool, typer.Option(help="Also the teacher in a plain diffusers loop.")] = True,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("benchmarks/speedup"),
) -> None:
    """Teacher against cascades: steps, schedules, text and decoding, by batch, eager and compiled."""
    from rich.console import Console

    from engines.benchmark.report import speedup_markdown
    from engines.benchmark.speedup import SpeedupSettings, run_speedup

    console = Console()
    use_threads(threads)
    measured = None if backbone or random_weights else checkpoint
    if engines is None and measured is not None:
        engines = _engines_at_hand(measured, backend, device, dtype, buckets_option(buckets))
    settings = SpeedupSettings(
        backbone=backbone or "embedded",
        checkpoint=measured,
        engines=engines,
        backend=backend,
        buckets=buckets_option(buckets),
        device=device,
        dtype=dtype,
        scale=scale,
        batches=whole_numbers("--batches", batches),
        variants=tuple(variants.split(",")) if variants else None,
        repeats=repeats,
        whole_limit=whole_limit,
        minutes=minutes,
        threads=threads,
        stock=stock,
        out=out,
    )
    with console.status("measuring") as status:
        content = run_speedup(settings, lambda what: status.update(what))
    console.print(speedup_markdown(content), markup=False, soft_wrap=True)


@app.command("engines")
def engines_command(
    checkpoint: Annotated[Path, typer.Option(help="Folder.")] = Path("models/embedded"),
    engines: Annotated[Path, typer.Option(help="Folder of its built engines.")] = Path("engines-cache"),
    backends: Annotated[str, typer.Option(help="Opened side by side, comma-separated.")] = "auto",
    buckets: Annotated[str | None, typer.Option(help="As the engines were built.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="As the engines were built; auto: the device's own.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds at most.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, as the engines were built.")] = None,
    batches: Annotated[str, typer.Option(help="Of the whole schedules.")] = "1,8",
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("benchmarks/engines"),
) -> None:
    """Every engine beside eager and the diffusers loop: latency, throughput, memory."""
    from rich.console import Console

    from engines.benchmark.batching import EngineBenchSettings, run_engines
    from engines.benchmark.report import engines_markdown

    console = Console()
    use_threads(threads)
    settings = EngineBenchSettings(
        checkpoint=checkpoint,
        engines=engines,
        backends=tuple(part.strip() for part in backends.split(",")),
        buckets=buckets_option(buckets),
        device=device,
        dtype=dtype,
        repeats=repeats,
        loop_batches=whole_numbers("--batches", batches),
        out=out,
    )
    with console.status("measuring") as status:
        content = run_engines(settings, lambda what: status.update(what))
    console.print(engines_markdown(content), markup=False, soft_wrap=True)


def _engines_at_hand(
    checkpoint: Path, backend: str, device: str, dtype: str, buckets: tuple[int, ...] | None
) -> Path | None:
    """The usual folder, where it holds all the checkpoint's engines; else None, and the command that builds them."""
    from engines.build import missing_engines, plan_checkpoint
    from engines.store import EngineStore

    store = EngineStore("engines-cache")
    plan = plan_checkpoint(checkpoint, backend, device, dtype, buckets)
    if plan.options.backend != "eager" and not missing_engines(plan, store):
        return store.root
    typer.echo(f"without engines, which are not built: {plan.command(store.root)}", err=True)
    return None
