"""``rmd engines``: list, verify, prune and measure built engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import DecoderOption

app = typer.Typer(
    help="List, verify, measure and prune built engines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Engines = Annotated[Path, typer.Option(help="The folder of built engines.")]


@app.command("list")
def list_engines(engines: Engines = Path("engines-cache")) -> None:
    """List the engines: key, what each is, bytes, error against eager, build and load seconds, latency."""
    from engines.store import EngineStore

    manifests = EngineStore(engines).list()
    if not manifests:
        typer.echo(f"no engines in {engines}; build some: rmd build --checkpoint FOLDER --engines {engines}")
        return
    columns = f"{'MiB':>8}{'L2':>10}{'build s':>9}{'load s':>8}{'ms':>10}"
    typer.echo(f"{'key':<14}{'backend':<14}{'engine':<32}{'weights':<12}{columns}")
    for manifest in manifests:
        error = "-" if manifest.relative_l2 is None else f"{manifest.relative_l2:.1e}"
        typer.echo(
            f"{manifest.key[:12]:<14}{manifest.spec.backend:<14}{manifest.spec.title:<32}{manifest.weights_mode:<12}"
            f"{manifest.bytes / (1 << 20):>8.1f}{error:>10}{manifest.build_seconds:>9.1f}"
            f"{manifest.load_seconds:>8.2f}  {manifest.milliseconds:>8}"
        )
    total = sum(manifest.bytes for manifest in manifests)
    typer.echo(f"{len(manifests)} engines, {total / (1 << 20):.1f} MiB")


@app.command()
def verify(engines: Engines = Path("engines-cache")) -> None:
    """Read every file and compare its sha256; tell which engines are damaged or foreign. Exit code 1 if any."""
    from engines.store import EngineStore

    store = EngineStore(engines)
    problems = store.verify()
    for problem in problems:
        typer.echo(f"{problem.key[:12]}  {'broken ' if problem.broken else 'foreign'}  {problem.message}")
    typer.echo(f"{len(store.keys()) - len(problems)} engines sound, {len(problems)} not")
    if problems:
        raise typer.Exit(1)


@app.command()
def prune(
    engines: Engines = Path("engines-cache"),
    broken: Annotated[bool, typer.Option("--broken", help="Remove damaged engines.")] = False,
    foreign: Annotated[
        bool, typer.Option("--foreign", help="Remove engines of other machines or library versions.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Remove every engine.")] = False,
    keys: Annotated[list[str] | None, typer.Option("--key", help="Remove the engine whose key begins so.")] = None,
) -> None:
    """Remove engines, and what builders that died left behind."""
    from engines.store import EngineStore

    store = EngineStore(engines)
    known = store.keys()
    if known and not (broken or foreign or everything or keys):
        raise ValueError("nothing to prune: give --broken, --foreign, --key KEY or --all")
    chosen = set(known) if everything else set()
    for prefix in keys or []:
        matching = [manifest_key for manifest_key in known if manifest_key.startswith(prefix)]
        if len(matching) != 1:
            raise ValueError(f"--key {prefix!r} names {len(matching)} engines; see `rmd engines list`")
        chosen |= set(matching)
    removed = store.prune(sorted(chosen))
    if broken or foreign:

        def unwanted(key: str) -> bool:
            problem = store.problem(key)
            return problem is not None and (broken if problem.broken else foreign)

        removed += store.prune(store.keys(), unwanted)
    typer.echo(f"{len(removed)} engines removed from {engines}")


@app.command()
def measure(
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint folder whose engines to time.")],
    engines: Engines = Path("engines-cache"),
    backend: Annotated[str, typer.Option(help="Backend of the engines.")] = "auto",
    device: Annotated[str, typer.Option(help="Torch device, cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Dtype of the engines; auto: the device's own.")] = "auto",
    buckets: Annotated[str | None, typer.Option(help="Their batch sizes, if they are not the default ones.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, as the engines were built.")] = None,
    decoder: DecoderOption = None,
) -> None:
    """Time the built engines of a checkpoint again, on a machine that is quiet now, and record the latencies.

    The server chooses its batch widths by them.
    """
    from cli.numbers import buckets_option, use_threads
    from engines.build.measure import measure as measure_built
    from engines.plan.checkpoint import plan_checkpoint
    from engines.store import EngineStore

    use_threads(threads)
    plan = plan_checkpoint(checkpoint, backend, device, dtype, buckets_option(buckets), decoder)
    measured = measure_built(plan, EngineStore(engines))
    if not measured:
        raise ValueError(
            f"none of the {len(plan.engines)} engines of {checkpoint} is in {engines}: {plan.command(engines)}"
        )
    for manifest in sorted(measured, key=lambda m: (m.spec.component, m.spec.size or "", m.spec.batch)):
        typer.echo(f"{manifest.spec.title:<32} {manifest.milliseconds:>9} ms")
