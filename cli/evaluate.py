"""`rmd evaluate`: the embedded models on their held-out sets; any model by the metrics of others (pictures, films)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.evaluate_any import films, pictures
from cli.groups import DefaultCommand
from cli.numbers import whole_numbers
from cli.options import DecoderOption
from cli.progress import progress_bar

if TYPE_CHECKING:
    from rmd.backbones.executor import Executor


app = typer.Typer(cls=DefaultCommand, add_completion=False, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Measure what a model draws. Without a command's name: embedded."""


@app.command()
def embedded(
    checkpoint: Annotated[Path, typer.Option(help="The student's folder.")] = Path("models/embedded"),
    teacher: Annotated[Path | None, typer.Option(help="By default the one that the checkpoint names.")] = None,
    data: Annotated[Path, typer.Option(help="Picture cache, as `rmd data` makes it.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Folder of the report (of the PNG files).")] = Path("benchmarks/quality"),
    cache: Annotated[Path, typer.Option(help="A stopped run goes on from here.")] = Path("runs/evaluate"),
    rows: Annotated[str, typer.Option(help="teacher, student-<schedule>, naive-<schedule>; comma-separated.")] = "",
    sets: Annotated[
        str,
        typer.Option(
            help="unseen_pair, unseen_concept, of films unseen_motion; or train, to choose among checkpoints "
            "without the test sets."
        ),
    ] = "",
    seeds: Annotated[str, typer.Option(help="Sampling seeds, comma-separated; the teacher takes the first.")] = "0,1,2",
    limit: Annotated[int | None, typer.Option(min=4, help="Of each set; by default 512 pictures, 64 films.")] = None,
    skip: Annotated[
        int, typer.Option(min=0, help="Leave out the first so many: apart from a table of that limit.")
    ] = 0,
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="Instead of the teacher's own number.")] = None,
    intensity: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Noise intensity a at the change of size, to ablate it.")
    ] = None,
    noise_upsampling: Annotated[
        str | None, typer.Option(help="bilinear, renormalised or nearest_block, to ablate it.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 64,
    features: Annotated[
        str, typer.Option(help="float32, or bfloat16: three times faster on a CPU with AMX, moved by about 3 %.")
    ] = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="Run the denoiser through torch.compile.")] = False,
    engines: Annotated[Path | None, typer.Option(help="Run in the engines in this folder (rmd build).")] = None,
    backend: Annotated[str, typer.Option(help="With --engines: which backend's.")] = "auto",
    decoder: DecoderOption = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    hero_split: Annotated[
        str,
        typer.Option(help="With --sheets: whose prompts README's grid shows: unseen_pair, unseen_concept or train."),
    ] = "unseen_pair",
    sheets: Annotated[bool, typer.Option("--sheets", help="Draw contact sheets instead.")] = False,
) -> None:
    """Measure an embedded checkpoint on the held-out sets, or draw its contact sheets (--sheets)."""
    from training.evaluate.embedded.models import EvaluationSettings
    from training.evaluate.embedded.run import evaluate
    from training.evaluate.embedded.sheets import draw_sheets
    from training.runtime.memory import keep_freed_memory

    keep_freed_memory(device)
    if compile and engines is not None:
        raise ValueError("--compile is for eager networks: leave it out, or leave out --engines")
    overrides: dict[str, float | str] = {}
    if intensity is not None:
        overrides["transition_noise_intensity"] = intensity
    if noise_upsampling is not None:
        overrides["noise_upsampling"] = noise_upsampling
    settings = EvaluationSettings(
        checkpoint=checkpoint,
        teacher=teacher,
        data=data,
        out=out,
        cache=cache,
        sets=_parts(sets),
        rows=_parts(rows),
        seeds=whole_numbers("--seeds", seeds, least=0),
        limit=limit,
        skip=skip,
        teacher_steps=teacher_steps,
        overrides=overrides,
        batch=batch,
        feature_dtype=features,
        compile=compile,
        executor=None if engines is None else _engines(checkpoint, engines, backend, device, decoder),
        executor_name="eager" if engines is None else _engines_name(checkpoint, backend, device, decoder),
        decoder=decoder,
        device=device,
    )
    with progress_bar() as show:
        if not sheets:
            report = evaluate(settings, show)["report"]
            written = [out / f"{report}.json", out / f"{report}.md"]
        else:
            folder = Path("docs") if out == Path("benchmarks/quality") else out
            if hero_split not in ("unseen_pair", "unseen_concept", "train"):
                raise ValueError(f"--hero-split {hero_split!r} is not unseen_pair, unseen_concept or train")
            written = draw_sheets(settings, folder, show, hero_split)  # type: ignore[arg-type]
    for path in written:
        typer.echo(str(path))


app.command()(pictures)
app.command()(films)


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _engines(
    checkpoint: Path, store: Path, backend: str, device: str, decoder: str | None
) -> Callable[[Path], Executor]:
    """Loads the checkpoint's engines with a folder's weights; the teacher runs in the student's."""

    def load(folder: Path) -> Executor:
        from engines.run.executor import EngineExecutor

        source = None if folder == checkpoint else folder
        return EngineExecutor.open(checkpoint, store, backend, device, weights_from=source, decoder=decoder)

    return load


def _engines_name(checkpoint: Path, backend: str, device: str, decoder: str | None) -> str:
    """Backend and the engines' keys: pictures by engines that were built differently are not taken from the cache."""
    from engines.plan.checkpoint import CheckpointPlan
    from engines.plan.options import EngineOptions

    plan = CheckpointPlan.read(checkpoint, EngineOptions.resolve(backend, device)[0], decoder)
    keys = "".join(engine.spec.key for engine in plan.engines)
    return f"{plan.options.backend} engines {hashlib.sha256(keys.encode()).hexdigest()[:12]}"
