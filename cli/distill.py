"""`rmd distill`: a teacher's folder and prompts in, a distilled checkpoint folder out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from training.distill.prompts import PromptSet
    from training.distill.run import Distillation
    from training.distill.settings import DistillSettings
    from training.distill.teacher import Teacher

_SHEET_PROMPTS = 8


def command(
    teacher: Annotated[Path, typer.Option(help="The teacher: a diffusers folder, or owner/name@revision.")],
    out: Annotated[Path, typer.Option(help="The checkpoint folder to write, such as models/embedded.")],
    method: Annotated[str | None, typer.Option(help="rmd (default), naive, tdm, dmd2 or swd.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Training time, over all resumptions; this or --iterations is needed.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Generator updates.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file, one prompt a line; by default the training captions of --data.")
    ] = None,
    data: Annotated[Path, typer.Option(help="The cache folder that `rmd data` wrote.")] = Path("data"),
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="Use only so many prompts, drawn by --set seed.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; flags win.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting, as name=value; may be given often.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance of the real score.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples an update.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Steps per stage, such as 2+2.")] = None,
    backbone: Annotated[str | None, typer.Option(help="The teacher's backbone, where its folder does not say.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints, metrics and sheets; runs/<out's name>.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    change_settings: Annotated[
        bool, typer.Option("--change-settings", help="On resuming, allow other guidance and rates.")
    ] = False,
    export_only: Annotated[
        bool, typer.Option("--export-only", help="Export the run's newest checkpoint and train nothing.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the networks.")] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Link the teacher's other components instead of copying.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; accelerate launch chooses by itself.")] = "auto",
) -> None:
    """Distil a teacher into a few-step cascade. SIGTERM saves and stops; --resume goes on."""
    from training.distill.settings import DistillSettings, parse_assignments

    flags: dict[str, Any] = {
        **parse_assignments(settings or []),
        **{
            key: value
            for key, value in {
                "method": method,
                "minutes": minutes,
                "iterations": iterations,
                "guidance_scale": guidance_scale,
                "batch_size": batch_size,
                "schedule": schedule,
                "compile": compile or None,
            }.items()
            if value is not None
        },
    }
    run = run or Path("runs") / out.name
    stored = run / "settings.json"
    if (resume or export_only) and config is None and stored.is_file():
        # YAML reads JSON: what the run was started with, then this call's flags.
        config = stored
    chosen = DistillSettings.read(config, flags)
    _print_settings(chosen)
    _run(
        chosen, teacher, out, run, backbone, prompts, data, max_prompts,
        device=device, resume=resume or export_only, change_settings=change_settings, export_only=export_only,
        share="link" if link else "copy",
    )  # fmt: skip


def _run(
    settings: DistillSettings,
    teacher_folder: Path,
    out: Path,
    run: Path,
    backbone: str | None,
    prompt_file: Path | None,
    data: Path,
    max_prompts: int | None,
    *,
    device: str,
    resume: bool,
    change_settings: bool,
    export_only: bool,
    share: str,
) -> None:
    import torch

    from rmd.dtypes import parse_dtype
    from training.distill.export import check_out
    from training.distill.run import PRECISIONS, Distillation
    from training.distill.teacher import Teacher, training_cascade
    from training.runtime.checkpoints import checkpoints
    from training.runtime.processes import processes

    if not resume and checkpoints(run / "checkpoints"):
        raise ValueError(f"{run} already holds checkpoints; --resume goes on with them, another --run starts anew")
    if export_only and not checkpoints(run / "checkpoints"):
        raise ValueError(f"{run} holds no checkpoint to export")
    initial = settings.initial_student
    if settings.lora_rank and initial is not None and Path(initial).resolve() == out.resolve():
        raise ValueError(
            f"--out {out} is also initial_student, and this run's checkpoints hold adapters of it (lora_rank): "
            f"an export would take their base away; give another --out"
        )
    if settings.iterations is None and settings.minutes is None and not export_only:
        raise ValueError("the run has no end: give --minutes or --iterations")
    check_out(out, teacher_folder)
    run.mkdir(parents=True, exist_ok=True)
    accelerator = processes(device)
    place = accelerator.device if device in ("auto", "cpu", "cuda") else torch.device(device)
    dtype = parse_dtype(PRECISIONS[settings.precision], place)
    teacher = Teacher.open(teacher_folder, backbone, dtype, place)
    settings = _for_backbone(settings, teacher)
    training_cascade(teacher, settings)  # a schedule that does not exist is said before any prompt is encoded
    with accelerator.main_process_first():  # the others read what it has encoded and drawn
        prompt_set = _prompts(teacher, prompt_file, data, max_prompts, settings, run, needed=not export_only)
        distillation = Distillation.build(
            teacher, prompt_set, settings, run, say=_say, to_export=export_only, accelerator=accelerator
        )
    trainer = distillation.trainer
    if resume:
        found = trainer.resume(change_settings, to_export=export_only)
        where = f"going on at update {trainer.progress.iteration}" if found else "no checkpoint yet: starting anew"
        _say(where)
    finished = True if export_only else _train(distillation)
    if not trainer.accelerator.is_main_process:
        return
    if not finished:
        _say(f"stopped and saved at update {trainer.progress.iteration}; --resume goes on")
        return
    _say(f"checkpoint folder: {distillation.export(out, share)}")


def _prompts(
    teacher: Any,
    file: Path | None,
    data: Path,
    max_prompts: int | None,
    settings: DistillSettings,
    run: Path,
    needed: bool,
) -> PromptSet:
    import random

    from training.distill.prompts import caption_prompts, encode_prompts, read_prompt_file

    if not needed:
        return encode_prompts(teacher.backbone, [""], run / "prompts")
    texts = read_prompt_file(file) if file else caption_prompts(data, settings.seed)
    if max_prompts is not None and max_prompts < len(texts):
        texts = random.Random(settings.seed).sample(texts, max_prompts)
    _say(f"{len(set(texts))} distinct prompts")
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("encoding prompts", total=1.0)
        return encode_prompts(
            teacher.backbone,
            texts,
            run / "prompts",
            negative=settings.negative_prompt,
            progress=lambda share: bar.update(task, completed=share),
        )


def _train(distillation: Distillation) -> bool:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from training.distill.trainer import Hooks

    trainer, settings = distillation.trainer, distillation.settings
    prompts = list(settings.sheet_prompts) or _spread(distillation)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, disable=not trainer.accelerator.is_main_process) as bar:
        task = bar.add_task(settings.method, total=1.0)
        bar.update(task, completed=trainer.share_done())

        def on_update(share: float, figures: dict[str, float]) -> None:
            iteration = trainer.progress.iteration
            bar.update(task, completed=share, description=_summary(iteration, figures))
            if not bar.console.is_terminal and iteration % (10 * settings.log_every) == 0:
                _say(f"{trainer.progress.seconds:8.1f} s  {_summary(iteration, figures)}")

        trainer.hooks = Hooks(on_update=on_update, on_sheet=lambda _trainer: _sheet(distillation, prompts))
        return trainer.train()


def _sheet(distillation: Distillation, prompts: list[str]) -> None:
    distillation.draw_sheet(prompts)


def _spread(distillation: Distillation) -> list[str]:
    """Prompts for the sheets, spread over the set."""
    texts = [text for text in getattr(distillation.method.prompts, "texts", []) if text] or ["a red circle"]
    stride = max(1, len(texts) // _SHEET_PROMPTS)
    return texts[::stride][:_SHEET_PROMPTS]


def _summary(iteration: int, figures: dict[str, float]) -> str:
    loss = figures.get("generator_loss", figures.get("warm_start_loss", float("nan")))
    norm = figures.get("generator_grad_norm", float("nan"))
    return f"update {iteration}  G {loss:.4f} (|g| {norm:.2f})  F {figures.get('fake_loss', float('nan')):.4f}"


def _print_settings(settings: DistillSettings) -> None:
    import yaml

    _say(yaml.safe_dump(settings.to_record(), sort_keys=False, default_flow_style=None, width=110).rstrip())


def _for_backbone(settings: DistillSettings, teacher: Teacher) -> DistillSettings:
    """The settings with the backbone's own defaults; says what is not as printed, or not as the method has it."""
    chosen, before = settings.for_backbone(teacher.backbone.profile), settings.to_record()
    if own := [f"{name}={value}" for name, value in chosen.to_record().items() if value != before[name]]:
        _say(f"{teacher.backbone.name}'s own defaults: {', '.join(own)}")
    if departures := chosen.departures():
        _say(f"departs from {chosen.method} as defined: {', '.join(departures)}")
    return chosen


def _say(text: str) -> None:
    typer.echo(text, err=True)
