"""`rmd generate`: one prompt or a file of them, through a checkpoint's cascades or its teacher, to files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.numbers import buckets_option, use_threads
from cli.options import DecoderOption

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from rmd.backbones.base import Backbone
    from rmd.cascade import Cascade

TEACHER = "teacher"


def command(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one a line; # starts a comment.")] = None,
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint folder.")] = Path("models/embedded"),
    schedule: Annotated[
        list[str] | None, typer.Option(help="A schedule of the checkpoint, or 'teacher'; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt; the next ones count up.", min=0)] = 0,
    engines: Annotated[Path | None, typer.Option(help="Use the engines in this folder (rmd build).")] = None,
    buckets: Annotated[str | None, typer.Option(help="With --engines: as they were built, such as 1,2,4.")] = None,
    backend: Annotated[str, typer.Option(help="With --engines: which backend's; without: eager.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16, float16, float32, auto (the device's own). Default: auto with engines, else float32."
        ),
    ] = None,
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
    runs = _open(checkpoint, names, engines, backend, device, dtype, buckets_option(buckets), decoder)
    single = sheet or (len(texts) == 1 and len(runs) == 1)
    video = runs[0][1].media == "video" and not sheet
    _check_out(out, single, ".mp4" if video else ".png")

    from cli.pictures import contact_sheet, to_pictures, write_mp4, write_png

    rows: list[list[Image]] = [[] for _ in texts]
    for label, backbone, cascade in runs:
        for first in range(0, len(texts), batch):
            part = texts[first : first + batch]
            seeds = range(seed + first, seed + first + len(part))
            for number, item in enumerate(_draw(backbone, cascade, part, seeds), start=first):
                if sheet:
                    rows[number].append(to_pictures(item[None])[0])
                    continue
                # Written at once: what is drawn is not lost if the run is stopped, nor kept in memory.
                heading = f"-{label}" if len(runs) > 1 else ""
                name = f"{number:04d}-{_slug(texts[number])}{heading}{'.mp4' if video else '.png'}"
                path = out if single and out.suffix else out / name
                if video:
                    write_mp4(item, path, backbone.frames_per_second)
                else:
                    write_png(to_pictures(item[None])[0], path)
                typer.echo(str(path))
    if sheet:
        path = out if out.suffix else out / "sheet.png"
        write_png(contact_sheet(rows, texts, [label for label, _, _ in runs]), path)
        typer.echo(str(path))


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise ValueError('give either one prompt ("a red fox") or --prompts FILE')
    if prompt is not None:
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return [prompt]
    assert file is not None
    from training.prompts import read_prompt_file

    return read_prompt_file(file)


def _check_out(out: Path, single: bool, suffix: str) -> None:
    if single and out.suffix and out.suffix.lower() != suffix:
        raise ValueError(f"--out {out}: this makes a {suffix} file")
    if not single and (out.suffix.lower() in (".png", ".mp4") or out.is_file()):
        raise ValueError(f"--out {out} is one file, and there are several pictures: give a folder, or --sheet")
    if not out.suffix and out.is_file():
        raise ValueError(f"--out {out} is a file: give a {suffix} name, or a folder")
    (out.parent if single and out.suffix else out).mkdir(parents=True, exist_ok=True)  # before anything is drawn


def _open(
    path: Path,
    names: Sequence[str],
    engines: Path | None,
    backend: str,
    device: str,
    dtype: str | None,
    buckets: tuple[int, ...] | None,
    decoder: str | None,
) -> list[tuple[str, Backbone, Cascade]]:
    """Heading, backbone and cascade of each schedule; the students' schedules share one backbone."""
    from rmd.backbones.registry import get_backbone
    from rmd.checkpoint import CheckpointFolder
    from rmd.dtypes import dtype_name, parse_dtype

    store = None if backend == "eager" else engines
    kind = parse_dtype(dtype or ("float32" if store is None else "auto"), device)
    folder = CheckpointFolder.read(path).with_decoder(decoder)
    names = [name or folder.default for name in names]
    for name in names:
        if name not in folder.cascades and name != TEACHER:
            raise ValueError(f"--schedule {name!r} is not in {path}: {', '.join([*folder.cascades, TEACHER])}")
    loaded: dict[Path, Backbone] = {}

    def load(weights: Path) -> Backbone:
        if weights not in loaded:
            backbone = get_backbone(folder.backbone_name).load(
                weights, dtype=kind, device=device, weights=store is None, decoder=folder.decoder_path
            )
            if store is not None:
                from engines.runner import EngineExecutor

                source = None if weights == path else weights  # the teacher runs in the student's engines
                backbone.executor = EngineExecutor.open(
                    path, store, backend, device, dtype=dtype_name(kind), buckets=buckets, weights_from=source,
                    decoder=decoder,
                )  # fmt: skip
            loaded[weights] = backbone
        return loaded[weights]

    runs: list[tuple[str, Backbone, Cascade]] = []
    for name in names:
        if name != TEACHER:
            runs.append((name, load(path), folder.cascades[name]))
            continue
        cascade = folder.teacher_cascade
        if cascade is None or folder.teacher_path is None or not folder.teacher_path.is_dir():
            raise ValueError(f"{path} names no teacher that is at hand (cascade.json, teacher.folder)")
        runs.append((name, load(folder.teacher_path), cascade))
    return runs


def _draw(backbone: Backbone, cascade: Cascade, texts: Sequence[str], seeds: range) -> Iterator[Tensor]:
    from rmd.sampler import sample

    conditioning = backbone.encode_prompts(texts)
    uncond = backbone.encode_unconditional(len(texts)) if cascade.guidance_scale != 1.0 else None
    latents = sample(backbone, cascade, conditioning, list(seeds), uncond=uncond)
    yield from backbone.decode(latents, cascade.full_size).cpu()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "prompt"
