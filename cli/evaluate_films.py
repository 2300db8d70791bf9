"""`rmd evaluate-films`: draw held-out films with a checkpoint and measure whether they move as asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.numbers import use_threads


def command(
    checkpoint: Annotated[Path, typer.Option(help="A film checkpoint's folder.")] = Path("models/embedded-video"),
    data: Annotated[Path, typer.Option(help="Picture cache, as `rmd data` writes it.")] = Path("data"),
    schedule: Annotated[str, typer.Option(help="A schedule of the checkpoint; 'teacher' for its own sampling.")] = "",
    films: Annotated[int, typer.Option(min=1, help="Films of each of the three held-out sets.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="With --schedule teacher: how many.")] = 50,
    guidance: Annotated[float | None, typer.Option(min=1, help="With --schedule teacher: its guidance.")] = None,
    size: Annotated[str | None, typer.Option(help="With --schedule teacher: such as 96x96x9.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first film of each set.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Films drawn together.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of films.json and the filmstrips.")] = Path("out/films"),
) -> None:
    """Draw held-out films, read their motion off the pixels, and write figures and filmstrips."""
    use_threads(threads)
    from rmd.backbones.registry import load_checkpoint
    from rmd.dtypes import parse_dtype
    from rmd.size import Size
    from training.data.dataset import PictureSet
    from training.evaluate.films import TEST_FILMS, evaluate_films, film_set
    from training.files import write_json
    from training.film_sheets import film_sampling, write_filmstrips

    pictures = PictureSet.load(data)
    backbone, folder = load_checkpoint(checkpoint, dtype=parse_dtype(dtype, device), device=device)
    if backbone.media != "video":
        raise ValueError(f"{checkpoint} draws pictures: give a film checkpoint")
    if schedule == "teacher":
        full = Size.parse(size) if size else backbone.full_size
        cascade = film_sampling(backbone, full, steps, guidance)
    else:
        name = schedule or folder.default
        if name not in folder.cascades:
            raise ValueError(f"--schedule {name!r} is not in {checkpoint}: {', '.join([*folder.cascades, 'teacher'])}")
        cascade = folder.cascades[name]
    tests = [
        film_set(pictures, split, films, cascade.full_size.height)
        for split in TEST_FILMS
        if split == "unseen_motion" or pictures.indices(split)
    ]
    figures, drawn = evaluate_films(backbone, cascade, tests, seed, batch)
    for test in tests:
        figure = figures[test.split]
        captions = [f"[{read}] {text}" for read, text in zip(figure["read"], test.prompts, strict=True)]
        write_filmstrips(out / f"{test.split}.png", drawn[test.split], captions)
        typer.echo(
            f"{test.split}: motion right {figure['motion']:.3f} +- {figure['motion_error']:.3f} of {figure['films']}, "
            f"way off by {figure['displacement']} px, flicker {figure['flicker']:.2f}"
        )
    write_json(
        out / "films.json",
        {
            "schedule": cascade.schedule_name,
            "guidance": cascade.guidance_scale,
            "size": str(cascade.full_size),
            "readable": {test.split: test.readable for test in tests},
            "sets": figures,
        },
    )
