"""`rmd generate`: one prompt or a file of them, through a checkpoint's cascades or its teacher, to files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.numbers import buckets_option, use_threads
from cli.options import DecoderOption

if TYPE_CHECKING:
    from PIL.Image import Image

    from rmd.pipeline import CascadePipeline


def command(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one a line; # starts a comment.")] = None,
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint folder, or owner/name@revision.")] = Path(
        "models/embedded"
    ),
    schedule: Annotated[
        list[str] | None, typer.Option(help="A schedule of the checkpoint, or 'teacher'; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt; the next ones count up.", min=0)] = 0,
    engines: Annotated[Path | None, typer.Option(help="Use the engines in this folder (rmd build).")] = None,
    buckets: Annotated[str | None, typer.Option(help="With --engines: as they were built, such as 1,2,4.")] = None,
    backend: Annotated[str, typer.Option(help="With --engines: which backend's; without: eager.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, auto: what the device is fast in.")] = "auto",
    decoder: DecoderOption = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; with --engines as they were built.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts drawn together.", min=1)] = 4,
    sheet: Annotated[bool, typer.Option("--sheet", help="One contact sheet instead of one file a prompt.")] = False,
    out: Annotated[Path, typer.Option(help="A .png or .mp4 file, or a folder for many.")] = Path("out"),
) -> None:
    """Draw one prompt or a file of them."""
    use_threads(threads)
    texts = _prompts(prompt, prompts)
    names = list(dict.fromkeys(schedule or [])) or [""]
    if backend not in ("auto", "eager") and engines is None:
        raise ValueError(f"--backend {backend} needs --engines FOLDER with engines that 'rmd build' made")
    from rmd.pipeline import CascadePipeline
    from rmd.published.hub import checkpoint_folder

    pipe = CascadePipeline.from_pretrained(
        checkpoint_folder(checkpoint),
        torch_dtype=dtype,
        device=device,
        engines=None if backend == "eager" else engines,
        backend=backend,
        buckets=buckets_option(buckets),
        decoder=decoder,
    )
    names = [name or pipe.checkpoint.default for name in names]
    for name in names:
        # Refuses what is not there before anything is drawn.
        if note := pipe.cascade(name).note:
            typer.echo(f"schedule {name}: {note}", err=True)
    single = sheet or (len(texts) == 1 and len(names) == 1)
    video = pipe.backbone.media == "video" and not sheet
    _check_out(out, single, ".mp4" if video else ".png")

    from cli.pictures import contact_sheet, write_mp4, write_png

    rows: list[list[Image]] = [[] for _ in texts]
    for label in names:
        for first in range(0, len(texts), batch):
            for number, item in enumerate(_draw(pipe, label, texts[first : first + batch], seed + first), start=first):
                if sheet:
                    rows[number].append(item[len(item) // 2])
                    continue
                # Written at once: what is drawn is not lost if the run is stopped, nor kept in memory.
                heading = f"-{label}" if len(names) > 1 else ""
                name = f"{number:04d}-{_slug(texts[number])}{heading}{'.mp4' if video else '.png'}"
                path = out if single and out.suffix else out / name
                if video:
                    write_mp4(item, path, pipe.backbone.frames_per_second)
                else:
                    write_png(item[0], path)
                typer.echo(str(path))
    if sheet:
        path = out if out.suffix else out / "sheet.png"
        write_png(contact_sheet(rows, texts, names), path)
        typer.echo(str(path))


def _draw(pipe: CascadePipeline, schedule: str, texts: Sequence[str], seed: int) -> list[list[Image]]:
    """Each prompt's frames; of a picture, the one."""
    drawn = pipe(texts, schedule=schedule, seed=seed)
    assert not isinstance(drawn, tuple)
    frames: list[list[Image]] = drawn.frames or [[picture] for picture in drawn.images]
    return frames


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise ValueError('give either one prompt ("a red fox") or --prompts FILE')
    if prompt is not None:
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return [prompt]
    assert file is not None
    from training.distill.prompt_files import read_prompt_file

    return read_prompt_file(file)


def _check_out(out: Path, single: bool, suffix: str) -> None:
    if single and out.suffix and out.suffix.lower() != suffix:
        raise ValueError(f"--out {out}: this makes a {suffix} file")
    if not single and (out.suffix.lower() in (".png", ".mp4") or out.is_file()):
        raise ValueError(f"--out {out} is one file, and there are several pictures: give a folder, or --sheet")
    if not out.suffix and out.is_file():
        raise ValueError(f"--out {out} is a file: give a {suffix} name, or a folder")
    (out.parent if single and out.suffix else out).mkdir(parents=True, exist_ok=True)  # before anything is drawn


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "prompt"
