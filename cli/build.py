"""``rmd build``: compile the engines of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.numbers import buckets_option, use_threads
from cli.options import DecoderOption

if TYPE_CHECKING:
    from engines.store import EngineStore


def command(
    checkpoint: Annotated[
        list[Path], typer.Option(help="The checkpoint folder, or owner/name@revision; repeated: several, in turn.")
    ],
    engines: Annotated[Path, typer.Option(help="The folder of built engines.")] = Path("engines-cache"),
    backend: Annotated[str, typer.Option(help="auto, inductor, eager, tensorrt or tensorrt_rtx.")] = "auto",
    buckets: Annotated[
        str | None, typer.Option(help="Batch sizes, such as 1,2,4,8 (default 1,2,4,8, on CUDA 16 too).")
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device, cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto: the device's own.")] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="Compilers at once (default: as many as fit).")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that the CPU engines will run on.")] = None,
    decoder: DecoderOption = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="List the engines and the memory they need, build none.")
    ] = False,
) -> None:
    """Compile one engine per component, size and batch bucket (TensorRT: per component and size, one profile a bucket).

    What is built already is kept: runs can be repeated.

    The engines of all the checkpoint's schedules are built, and those that its teacher needs (the full size, two rows a
    guided picture). Each is compared with eager execution and timed before it counts.
    """
    from engines.store import EngineStore
    from rmd.published.hub import checkpoint_folder

    options = {
        "backend": backend,
        "device": device,
        "dtype": dtype,
        "buckets": buckets_option(buckets),
        "decoder": decoder,
    }
    use_threads(threads)
    for folder in [checkpoint_folder(each) for each in checkpoint]:
        if len(checkpoint) > 1:
            typer.echo(f"{folder}:")
        if plan_only:
            _plan(folder, EngineStore(engines), options)
        else:
            _build(folder, EngineStore(engines), options, workers)


def _plan(checkpoint: Path, store: EngineStore, options: dict[str, Any]) -> None:
    """List a checkpoint's engines and the memory they need."""
    from engines.plan.checkpoint import missing_engines, plan_checkpoint

    plan = plan_checkpoint(checkpoint, **options)
    missing = {engine.spec.key for engine in missing_engines(plan, store)}
    for engine in plan.engines:
        typer.echo(
            f"{engine.spec.key[:12]}  {'missing' if engine.spec.key in missing else 'built  '}  {engine.spec.title}"
        )
    typer.echo(plan.memory().describe())
    if missing:
        plan.memory().check()


def _build(checkpoint: Path, store: EngineStore, options: dict[str, Any], workers: int | None) -> None:
    """Build a checkpoint's engines and tell of each."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from engines.build.checkpoint import build_checkpoint
    from engines.build.progress import BuildProgress

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[left]}")) as bar:
        task = bar.add_task("building", total=None, left="")

        def report(progress: BuildProgress) -> None:
            left = "" if progress.remaining is None else f"about {progress.remaining:.0f} s left"
            bar.update(task, completed=progress.done, total=progress.total, description=progress.current, left=left)

        done = build_checkpoint(
            checkpoint, store, progress=report, workers=workers, announce=bar.console.print, **options
        )
    for manifest in sorted(done.built, key=lambda m: (m.spec.component, m.spec.size or "", m.spec.batch)):
        error = "" if manifest.relative_l2 is None else f"  L2 {manifest.relative_l2:.1e}"
        note = f"  ({manifest.note})" if manifest.note else ""
        typer.echo(
            f"{manifest.spec.title:<32} {manifest.milliseconds:>9} ms  "
            f"built in {manifest.build_seconds:5.1f} s{error}{note}"
        )
    typer.echo(
        f"{len(done.built)} engines built, {done.reused} there, {done.seconds:.0f} s ({done.backend}), in {store.root}"
    )
