"""`rmd distill`: a teacher's folder and prompts in, a distilled checkpoint folder out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from training.distill.prompts import PromptSet
    from training.distill.run import Distillation
    from training.distill.settings import DistillSettings
    from training.distill.teacher import Teacher
    from training.distill.trainer import Trainer

_SHEET_PROMPTS = 8


def command(
    teacher: Annotated[
        Path | None, typer.Option(help="The teacher: a diffusers folder, or owner/name@revision.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The checkpoint folder to write, such as models/embedded.")] = None,
    method: Annotated[str | None, typer.Option(help="rmd (default), naive, tdm, dmd2 or swd.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Training time, over all resumptions; this or --iterations is needed.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Generator updates.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="One prompt a line, .jsonl or .parquet; by default the training captions of --data."),
    ] = None,
    prompt_column: Annotated[str, typer.Option(help="Field or column of .jsonl or .parquet prompts.")] = "prompt",
    prompt_cache: Annotated[
        Path | None,
        typer.Option(help="Folder of encoded prompts, shared by runs; .prompts beside the run's by default."),
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print schedule, parameters, memory and work, and load no weight.")
    ] = False,
    gpu_memory: Annotated[
        float | None, typer.Option(help="GB of each GPU, for --dry-run; this machine's own by default.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many there will be, for --dry-run.")] = 1,
) -> None:
    """Distil a teacher into a few-step cascade. SIGTERM saves and stops; --resume goes on."""
    from training.distill.settings import DistillSettings, parse_assignments
    from training.runtime.processes import lost_processes

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
    if dry_run:
        from cli.distill_plan import print_plan

        chosen = DistillSettings.read(config, flags)
        print_plan(chosen, teacher, backbone or chosen.backbone, device, gpu_memory, gpus)
        return
    if teacher is None or out is None:
        raise ValueError("give --teacher and --out; --dry-run alone needs neither")
    run = run or Path("runs") / out.name
    stored = run / "settings.json"
    if (resume or export_only) and config is None and stored.is_file():
        # YAML reads JSON: what the run was started with, then this call's flags.
        config = stored
    chosen = DistillSettings.read(config, flags)
    _print_settings(chosen)
    # Before and after training too: the others wait for the process that encodes prompts or exports.
    with lost_processes("start all of them again, with --resume once the run holds a checkpoint"):
        _run(
            chosen, teacher, out, run, backbone or chosen.backbone,
            PromptSource(prompts, prompt_column, data, max_prompts, prompt_cache or run.parent / ".prompts"),
            device=device, resume=resume or export_only, change_settings=change_settings, export_only=export_only,
            share="link" if link else "copy",
        )  # fmt: skip


def _run(
    settings: DistillSettings,
    teacher_folder: Path,
    out: Path,
    run: Path,
    backbone: str | None,
    source: PromptSource,
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
    from training.distill.prompts import encode_prompts, release_text_encoders
    from training.distill.run import PRECISIONS, Distillation
    from training.distill.teacher import Teacher, training_cascade
    from training.runtime.checkpoints import checkpoints
    from training.runtime.memory import keep_freed_memory
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
    accelerator = processes(device, settings.tracker, run)
    place = accelerator.device if device in ("auto", "cpu", "cuda") else torch.device(device)
    keep_freed_memory(place.type)
    dtype = parse_dtype(PRECISIONS[settings.precision], place)
    teacher = Teacher.open(teacher_folder, backbone, dtype, place)
    settings = _for_backbone(settings, teacher)
    training_cascade(teacher, settings)  # a schedule that does not exist is said before any prompt is encoded
    encode = partial(
        encode_prompts,
        teacher.backbone,
        cache=source.cache,
        negative=settings.negative_prompt,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
    )
    texts = [""] if export_only else source.read(settings.seed)
    sheets = None
    if not export_only and settings.sheet_every:
        sheets = encode(_sheet_prompts(settings, texts))
    prompt_set = _encoded(encode, texts)
    release_text_encoders(teacher.backbone)
    distillation = Distillation.build(
        teacher, prompt_set, settings, run, say=_say, to_export=export_only, accelerator=accelerator
    )
    trainer = distillation.trainer
    if resume:
        found = trainer.resume(change_settings, to_export=export_only)
        where = f"going on at update {trainer.progress.iteration}" if found else "no checkpoint yet: starting anew"
        _say(where)
    if not export_only and not _train(distillation, sheets):
        _say(f"stopped and saved at update {trainer.progress.iteration}; --resume goes on")
        return
    distillation.export(out, share)
    if accelerator.is_main_process:
        _say(f"checkpoint folder: {out}")


@dataclass(frozen=True)
class PromptSource:
    """Where a run's prompts come from, and where they are kept encoded."""

    file: Path | None
    column: str
    data: Path
    most: int | None
    cache: Path

    def read(self, seed: int) -> list[str]:
        """The prompts, as often as each is to be drawn.

        Raises:
            FileNotFoundError, ValueError: see :func:`training.distill.prompt_files.read_prompt_file`.
        """
        from training.distill.prompt_files import caption_prompts, read_prompt_file

        texts = read_prompt_file(self.file, self.column) if self.file else caption_prompts(self.data, seed)
        if self.most is not None and self.most < len(texts):
            texts = random.Random(seed).sample(texts, self.most)
        return texts


def _encoded(encode: Callable[..., PromptSet], texts: list[str]) -> PromptSet:
    from rich.progress import Progress

    _say(f"{len(set(texts))} distinct prompts")
    with Progress(transient=True) as bar:
        task = bar.add_task("encoding prompts", total=1.0)
        return encode(texts, progress=lambda share: bar.update(task, completed=share))


def _sheet_prompts(settings: DistillSettings, texts: list[str]) -> list[str]:
    """What the sheets are drawn of: given prompts, or some spread over the set."""
    from training.distill.prompt_files import read_prompt_file

    if settings.sheet_prompts:
        return list(settings.sheet_prompts)
    if settings.validation_prompts is not None:
        return read_prompt_file(Path(settings.validation_prompts))
    distinct = list(dict.fromkeys(texts))
    return distinct[:: max(1, len(distinct) // _SHEET_PROMPTS)][:_SHEET_PROMPTS]


def _train(distillation: Distillation, sheets: PromptSet | None) -> bool:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from training.distill.trainer import Hooks
    from training.runtime.processes import start_tracker

    trainer, settings = distillation.trainer, distillation.settings
    accelerator = trainer.accelerator
    if settings.tracker != "none":
        start_tracker(accelerator, trainer.run, settings.to_record())
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

        def on_record(line: dict[str, float]) -> None:
            accelerator.log(line, step=int(line["iteration"]))

        def on_sheet(_trainer: Trainer) -> None:
            if sheets is not None:
                distillation.draw_sheet(sheets)

        trainer.hooks = Hooks(on_update=on_update, on_record=on_record, on_sheet=on_sheet)
        finished = trainer.train()
    accelerator.end_training()
    return finished


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
