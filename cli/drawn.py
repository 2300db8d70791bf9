"""Checkpoints and folders of files, as `rmd evaluate pictures`, `rmd evaluate films` and `rmd study` take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from PIL.Image import Image

    from rmd.pipeline import CascadePipeline
    from training.evaluate.shared.sources import Source

PromptsOption = Annotated[Path, typer.Option(help="A file of prompts, one a line; # starts a comment.")]
SchedulesOption = Annotated[
    list[str] | None,
    typer.Option("--schedule", help="Of checkpoints: theirs, or 'teacher'; may be given several times."),
]
SeedsOption = Annotated[str, typer.Option(help="Sampling seeds of checkpoints, comma-separated.")]
CacheOption = Annotated[Path, typer.Option(help="What checkpoints draw is kept here; a stopped run goes on from it.")]
EnginesOption = Annotated[Path | None, typer.Option(help="Draw in the engines in this folder (rmd build).")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="bfloat16, float16, float32, auto: what the device is fast in.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Prompts drawn together.")]


@dataclass(frozen=True)
class Runtime:
    """What checkpoints run in."""

    engines: Path | None
    decoder: str | None
    device: str
    dtype: str

    def pipeline(self, checkpoint: Path) -> CascadePipeline:
        """The checkpoint's pipeline."""
        from rmd.pipeline import CascadePipeline

        return CascadePipeline.from_pretrained(
            checkpoint, torch_dtype=self.dtype, device=self.device, engines=self.engines, decoder=self.decoder
        )


@dataclass(frozen=True)
class Drawn:
    """What checkpoints draw, and where it is kept."""

    runtime: Runtime
    seeds: tuple[int, ...]
    cache: Path
    schedules: Sequence[str]
    batch: int

    def sources(
        self, paths: Sequence[Path], prompts: Sequence[str], media: str | None, progress: Callable[[str, float], None]
    ) -> list[Source]:
        """A source for each folder of files and for each checkpoint's schedule; what is missing is drawn.

        Args:
            media: "image", where films are not wanted; either when None.

        Raises:
            ValueError: a path that is given twice, a schedule that a checkpoint has not, or one of another medium.
        """
        from rmd.checkpoint import CASCADE_FILE
        from rmd.published.hub import checkpoint_folder
        from training.evaluate.shared.sources import FILMS, PICTURES, draw_source, read_source

        if len(set(paths)) < len(paths):
            raise ValueError("a path is given twice")
        suffixes = PICTURES if media == "image" else (*PICTURES, *FILMS)
        found: list[Source] = []
        for path in paths:
            folder = checkpoint_folder(path)
            if not (folder / CASCADE_FILE).is_file():
                found.append(read_source(folder, prompts, suffixes))
                continue
            pipe = self.runtime.pipeline(folder)
            if media is not None and pipe.backbone.media != media:
                raise ValueError(f"{path} draws films: see rmd evaluate films")
            schedules = self.schedules or [pipe.checkpoint.default]
            for schedule in schedules:
                pipe.cascade(schedule)  # refuses what is not there before anything is drawn
            write = writer(pipe)
            found += [
                draw_source(pipe, schedule, prompts, self.seeds, self.cache, write, self.batch, progress)
                for schedule in schedules
            ]
        return found


def writer(pipe: CascadePipeline) -> Callable[[Sequence[Image], Path], None]:
    """Writes what the pipeline draws."""
    from cli.pictures import write_mp4, write_png

    if pipe.backbone.media == "video":
        return lambda frames, path: write_mp4(frames, path, pipe.backbone.frames_per_second)
    return lambda frames, path: write_png(frames[0], path)
