"""`rmd cascade`: show a preset's steps without loading a model, write it into a folder, or move a folder's steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rmd.cascade import Cascade
    from rmd.checkpoint import CheckpointFolder
    from rmd.noise_schedule import NoiseSchedule

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Cascades: which step runs at which size and time."""


@app.command()
def show(
    preset: Annotated[str, typer.Option(help="A backbone's or public student's cascade, such as sdxl.")] = "embedded",
    thresholds: Annotated[str | None, typer.Option(help="logSNR thresholds, ascending: -6,-2.5")] = None,
    resolution_map: Annotated[str | None, typer.Option("--map", help="shift, logsnr, none or inverse.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Steps per stage, such as 1+3, 0+4 or 1+1+2.")] = None,
    naive: Annotated[bool, typer.Option("--naive", help="A public student's first steps at smaller sides.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a cascade's steps: stage, mapped and teacher's timestep, size, logSNR, noise intensity.

    logSNR is the backbone's own at the teacher's timestep: what the thresholds are compared with. The noise intensity a
    is that of the move to the next step: 1 is deterministic, 0 fresh noise. A public student's source, files and
    licence follow.
    """
    from cli.presets import origin
    from rmd.presets import preset as named
    from rmd.presets import preset_noise_schedule

    if naive:
        cascade = _naive(preset, schedule, thresholds or resolution_map)
    else:
        cuts = _numbers(thresholds, "--thresholds", "-6,-2.5")
        cascade = named(preset, thresholds=cuts, resolution_map=resolution_map, schedule=schedule)
    rows = _rows(cascade, preset_noise_schedule(preset))
    if json:
        import json as json_module

        typer.echo(json_module.dumps({"steps": rows, **origin(preset)}))
        return
    _print_table(cascade, rows)
    for name, value in origin(preset).items():
        typer.echo(f"{name}: {value}")


@app.command()
def write(
    folder: Annotated[Path, typer.Argument(help="A diffusers folder, such as a public few-step student's.")],
    preset: Annotated[str, typer.Option(help="Its cascade, such as sdxl-turbo or sdxl-lightning.")],
    schedule: Annotated[
        str | None, typer.Option(help="Steps per stage, such as 2+2; with --naive for a student.")
    ] = None,
    naive: Annotated[bool, typer.Option("--naive", help="A public student's first steps at smaller sides.")] = False,
) -> None:
    """Write a preset into a folder as its cascade.json, so that `rmd build`, `generate` and `serve` take it.

    A folder whose files contradict the preset (another base, another parametrisation) is refused. `--naive` is a
    cascade without training: the file, the folder's README and whatever serves it say so. A checkpoint of that preset,
    such as `rmd import` wrote, takes it as a further schedule.
    """
    from rmd.backbones.student_fit import check_student, fitting_family, read_facts
    from rmd.cascade_file import write_cascade_json
    from rmd.checkpoint import CASCADE_FILE
    from rmd.presets import preset as named
    from rmd.published.card import add_note
    from rmd.weight_files import check_weights

    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} has no model_index.json; give a diffusers folder")
    if (folder / CASCADE_FILE).exists():
        _add_naive(folder, preset, schedule, naive)
        return
    cascade = _naive(preset, schedule) if naive else named(preset, schedule=schedule)
    check_weights(folder)
    check_student(preset, folder)
    written = write_cascade_json(
        folder,
        backbone=fitting_family(preset, None, read_facts(folder, preset).denoiser).name,
        cascades={cascade.schedule_name: cascade},
        default=cascade.schedule_name,
        distillation={"method": "none", "note": cascade.note} if cascade.note else {},
    )
    add_note(folder, cascade)
    typer.echo(f"{written}: {cascade.note}" if cascade.note else str(written))


@app.command()
def retime(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    timesteps: Annotated[str, typer.Option(help="The teacher's timesteps, one a step: 1000,750,600,300.")],
    schedule: Annotated[str | None, typer.Option(help="The schedule to change; the folder's default.")] = None,
) -> None:
    """Sample a checkpoint's schedule at other times: its cascade.json is rewritten, its weights stay as they are."""
    from dataclasses import replace

    from rmd.backbones.registry import get_backbone
    from rmd.cascade import Cascade
    from rmd.checkpoint import CheckpointFolder
    from rmd.profiles import PROFILES

    checkpoint = CheckpointFolder.read(folder)
    name = schedule or checkpoint.default
    if name not in checkpoint.cascades:
        raise ValueError(f"--schedule {name!r} is not in {folder}: {', '.join(checkpoint.cascades)}")
    old = checkpoint.cascades[name]
    if isinstance(old.step_noise_intensity, tuple):
        raise ValueError(f"{folder}: {name}'s noise intensities, one a transition, were made for the times it has")
    moved = Cascade.from_steps(
        old.name,
        _timesteps(timesteps),
        [step.size for step in old.steps],
        full_size=old.full_size,
        resolution_map=old.resolution_map,
        schedule=PROFILES[get_backbone(checkpoint.backbone_name).profile].noise_schedule(),
    )
    written = _put(checkpoint, name, replace(old, steps=moved.steps))
    typer.echo(f"{written}: {name} at {', '.join(str(step.timestep) for step in moved.steps)}")


def _put(checkpoint: CheckpointFolder, name: str, cascade: Cascade) -> Path:
    """Writes a schedule into a checkpoint's file; all else in it stays.

    Raises:
        FileNotFoundError, ValueError: its small decoder is not there, or not the recorded one.
    """
    from rmd.cascade_file import write_cascade_json

    decoder = checkpoint.with_decoder(None).decoder_path
    if decoder is not None and not decoder.is_dir():
        raise FileNotFoundError(f"{checkpoint.path}: its decoder {decoder} is not a folder; put it back")
    return write_cascade_json(
        checkpoint.path,
        backbone=checkpoint.backbone_name,
        cascades={**checkpoint.cascades, name: cascade},
        default=checkpoint.default,
        teacher=checkpoint.teacher,
        distillation=checkpoint.distillation,
        decoder=checkpoint.decoder,
    )


def _add_naive(folder: Path, preset: str, schedule: str | None, naive: bool) -> None:
    """A student's checkpoint gets its naive cascade as a further schedule."""
    from rmd.checkpoint import CASCADE_FILE, CheckpointFolder
    from rmd.published.card import add_note

    there = f"{folder / CASCADE_FILE} is there already"
    if not naive:
        raise ValueError(f"{there}; remove it to write another")
    cascade = _naive(preset, schedule)
    checkpoint = CheckpointFolder.read(folder)
    names = {own.name for own in checkpoint.cascades.values()}
    if not names & {preset, cascade.name}:
        raise ValueError(f"{there}, and its weights are sampled as {', '.join(sorted(names))}, not as {preset}")
    name = cascade.schedule_name
    if name in checkpoint.cascades:
        raise ValueError(f"{there}, with a schedule {name!r}")
    written = _put(checkpoint, name, cascade)
    add_note(folder, cascade)
    typer.echo(f"{written}: schedule {name} beside {checkpoint.default}, {cascade.note}")


def _naive(preset: str, schedule: str | None, cut: str | None = None) -> Cascade:
    from rmd.naive import naive_cascade

    if schedule is None:
        raise ValueError("--naive needs --schedule, steps per stage such as 2+2")
    if cut is not None:
        raise ValueError("--naive takes no --thresholds and no --map")
    return naive_cascade(preset, schedule)


def _numbers(text: str | None, option: str, such_as: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} is not a list of numbers such as {such_as}") from None


def _timesteps(text: str) -> list[int]:
    times = _numbers(text, "--timesteps", "1000,750,600,300") or []
    if not all(time.is_integer() for time in times):
        raise ValueError(f"--timesteps {text!r}: the teacher's timesteps are whole numbers")
    return [int(time) for time in times]


def _rows(cascade: Cascade, schedule: NoiseSchedule) -> list[dict[str, Any]]:
    from rmd.sampler import noise_intensity

    return [
        {
            "stage": step.stage,
            "timestep": step.timestep,
            "teacher_timestep": step.teacher_timestep,
            "width": step.size.width,
            "height": step.size.height,
            "logsnr": None if step.teacher_timestep == 1000 else schedule.log_snr(step.teacher_timestep / 1000),
            "noise_intensity": None if index + 1 == cascade.num_steps else noise_intensity(cascade, index),
        }
        for index, step in enumerate(cascade.steps)
    ]


def _print_table(cascade: Cascade, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{cascade.name} {cascade.schedule_name}, map {cascade.resolution_map}")
    for column in ("stage", "timestep", "teacher's", "size", "logSNR", "a"):
        table.add_column(column, justify="right")
    for step, row in zip(cascade.steps, rows, strict=True):
        log_snr = "-inf" if row["logsnr"] is None else f"{row['logsnr']:.3f}"
        intensity = "" if row["noise_intensity"] is None else f"{row['noise_intensity']:.4g}"
        times = f"{step.timestep:.6g}", f"{step.teacher_timestep:.6g}"
        table.add_row(str(step.stage), *times, str(step.size), log_snr, intensity)
    console = Console()
    console.print(table)
    if cascade.note:
        console.print(cascade.note)
    for stage in cascade.stages:
        low, high = stage.teacher_interval
        console.print(f"stage {stage.index}: matched on the teacher's axis from {low:.3f} to {high:.3f}")
