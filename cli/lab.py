"""`rmd lab`: the paper's comparisons on a small pair of sizes: plan, teacher, queue, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=__doc__)

GridOption = Annotated[Path | None, typer.Option("--grid", help="YAML file of the grid; the shipped one by default.")]
RootOption = Annotated[Path, typer.Option("--root", help="Everything large: teacher, runs, starts, pictures.")]
ResultsOption = Annotated[Path, typer.Option("--results", help="The small results, to be committed.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
ROOT, RESULTS = Path("runs/lab"), Path("benchmarks/lab")
SHIPPED_TEACHER = Path("models/embedded-lab-teacher")
"""Whose results are committed."""


def _grid_file(grid: Path | None) -> Path:
    from training.lab.grid import DEFAULT_GRID

    return grid or DEFAULT_GRID


@app.command()
def plan(grid: GridOption = None, root: RootOption = ROOT, results: ResultsOption = RESULTS) -> None:
    """Print the grid: what runs, what it costs, what stands, and what is expected of it."""
    from training.lab.grid import Grid
    from training.lab.plan import plan_text

    typer.echo(plan_text(Grid.read(_grid_file(grid)), root, results))


@app.command()
def teacher(
    pictures: Annotated[Path, typer.Option(help="Picture cache, as `rmd data` writes it.")] = Path("data"),
    initial: Annotated[Path, typer.Option(help="The shipped teacher, which is gone on with.")] = Path(
        "models/embedded-teacher"
    ),
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Instead of the grid's.")] = None,
    grid: GridOption = None,
    root: RootOption = ROOT,
    device: DeviceOption = "cpu",
) -> None:
    """Train the lab's teacher at half the shipped one's sizes. SIGTERM saves and stops; the same command goes on."""
    from training.lab.grid import Grid
    from training.lab.teacher import train_lab_teacher
    from training.runtime.memory import keep_freed_memory

    keep_freed_memory(device)
    folder = train_lab_teacher(
        Grid.read(_grid_file(grid)), pictures, root, initial, minutes=minutes, device=device, say=typer.echo
    )
    typer.echo(f"teacher in {folder}" if folder else "stopped and saved; the same command goes on")


@app.command()
def run(
    jobs: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Stop after so long; else when all is done.")] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help=f"The lab's teacher; the one trained in --root by `rmd lab teacher`, else {SHIPPED_TEACHER}."
        ),
    ] = None,
    pictures: Annotated[Path, typer.Option(help="Picture cache, as `rmd data` writes it.")] = Path("data"),
    data: Annotated[
        Path | None, typer.Option(help="Picture cache at the teacher's side; by default --pictures, halved.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each process.")] = None,
    grid: GridOption = None,
    root: RootOption = ROOT,
    results: ResultsOption = RESULTS,
    device: DeviceOption = "cpu",
) -> None:
    """Work on the queue; any number of these commands may share one --root. SIGTERM saves and stops."""
    from training.lab.queue import LabFolders, run_queue
    from training.lab.teacher import halve_pictures

    trained = root / "models" / "embedded-teacher"
    if data is None:
        data = root / "data"
        halve_pictures(pictures, data)
    folders = LabFolders(
        grid=_grid_file(grid),
        root=root,
        results=results,
        teacher=teacher or (trained if trained.is_dir() else SHIPPED_TEACHER),
        data=data,
        device=device,
    )
    if not run_queue(folders, jobs, minutes, threads, typer.echo):
        raise SystemExit(1)


@app.command()
def report(
    grid: GridOption = None,
    results: ResultsOption = RESULTS,
    out: Annotated[Path, typer.Option(help="The page; its plots and sheet go beside it.")] = Path("docs/results.md"),
) -> None:
    """Write tables, plots and sheet from the results, the paper's order, nulls said."""
    from training.lab.grid import Grid
    from training.lab.report import write_results

    for path in write_results(Grid.read(_grid_file(grid)), results, out):
        typer.echo(path)
