"""The lab's teacher: the shipped one taken to half its sizes in a few minutes.

64 pixels (16 tokens) is new to it and 128 is its old low size: the gap between the two is the one that is closed. It
keeps the shipped autoencoder, so nothing else has to be made.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from rmd.cascade import Cascade
from rmd.cascade_file import write_cascade_json
from rmd.checkpoint import CheckpointFolder
from rmd.timesteps import uniform_teacher_timesteps
from training.embedded.data.dataset import META_FILE, PIXELS_FILE, RECORDS_FILE, PictureSet
from training.embedded.teacher_run import TeacherRun
from training.lab.cost import teacher_size
from training.lab.grid import Grid
from training.runtime.files import write_text


def halved(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Straight-alpha pictures (B, S, S, 4) uint8 at half their side: area means of the premultiplied colours."""
    pixels = rgba.astype(np.float32)
    alpha = pixels[..., 3:]
    count, side = rgba.shape[:2]
    both = np.concatenate([pixels[..., :3] * alpha, alpha], -1)
    means = both.reshape(count, side // 2, 2, side // 2, 2, 4).mean((2, 4))
    colours = means[..., :3] / np.maximum(means[..., 3:], 1e-6)
    found: NDArray[np.uint8] = (np.concatenate([colours, means[..., 3:]], -1) + 0.5).clip(0, 255).astype(np.uint8)
    return found


def halve_pictures(source: Path, target: Path, batch: int = 256) -> None:
    """Write the picture cache ``source`` at half its side into ``target``, unless it is there.

    Raises:
        FileNotFoundError: ``source`` is no picture cache.
    """
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target / ".lock"):
        if not (target / PIXELS_FILE).is_file():
            _halve_pictures(source, target, batch)


def _halve_pictures(source: Path, target: Path, batch: int) -> None:
    pictures = PictureSet.load(source)
    count, side = pictures.rgba.shape[:2]
    for name in (META_FILE, RECORDS_FILE):
        shutil.copyfile(source / name, target / name)
    scratch = target / f"{PIXELS_FILE}.partial"
    made = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.uint8, shape=(count, side // 2, side // 2, 4))
    for start in range(0, count, batch):
        made[start : start + batch] = halved(pictures.rgba[start : start + batch])
    made.flush()
    scratch.rename(target / PIXELS_FILE)


def train_lab_teacher(
    grid: Grid,
    pictures: Path,
    root: Path,
    initial: Path,
    *,
    minutes: float | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> Path | None:
    """Train the lab's teacher, or go on with it.

    Args:
        pictures: the picture cache as `rmd data` writes it.
        root: gets ``data/``, ``teacher/`` and ``models/``.
        initial: the shipped teacher's folder.
        minutes: instead of the grid's.

    Returns:
        the teacher's folder; None when it was stopped before its time.
    """
    halve_pictures(pictures, root / "data")
    run = TeacherRun(root / "data", root / "teacher", root / "models", device=device, sheets=False, log=say)
    run.prepare(autoencoder_minutes=1.0, initial=initial)
    settings = {**grid.teacher, "initial": initial}
    trainer = run.train(**settings if minutes is None else {**settings, "minutes": minutes})
    if not trainer.finished:
        return None
    folder = run.export()
    write_lab_card(folder, grid)
    return folder


def write_lab_card(folder: Path, grid: Grid) -> None:
    """Give an exported teacher's folder the lab's size, at which it draws when nothing else is asked for, and its card.

    Raises:
        ValueError: it is no teacher's folder.
    """
    exported, size = CheckpointFolder.read(folder), teacher_size(grid)
    spec = exported.teacher
    if spec is None:
        raise ValueError(f"{folder} names no teacher")
    cascade = Cascade.from_steps(
        "embedded-lab-teacher",
        uniform_teacher_timesteps(spec.steps, spec.flow_shift),
        [size] * spec.steps,
        flow_shift=spec.flow_shift,
        guidance_scale=spec.guidance_scale,
        score_noise_intensity=0.0,
    )
    write_cascade_json(
        folder,
        backbone=exported.backbone_name,
        cascades={cascade.schedule_name: cascade},
        default=cascade.schedule_name,
        teacher=spec,
        distillation=exported.distillation,
    )
    trained = exported.distillation.get("training", {})
    units = {"minutes": "minutes", "step": "steps", "samples": "samples"}
    work = ", ".join(f"{trained.get(name)} {unit}" for name, unit in units.items())
    write_text(
        folder / "README.md",
        f"""# The lab's teacher

The embedded teacher (`models/embedded-teacher`) gone on with at half its sizes, 64 and 128 px, for the comparisons of
`rmd lab` (docs/results.md), all of which distil this one. It is no better picture model than the one that it came from.

- {work}, on {trained.get("device")}
- sampling: {spec.steps} Euler steps at {size}, guidance {spec.guidance_scale:g}
- everything but the transformer is the embedded model's, linked

```
rmd data
rmd lab teacher
```

Trained for a time, not for a number of steps: another machine's teacher is another one, and its results are kept apart.
Credits and licences: see NOTICE.
""",
    )
