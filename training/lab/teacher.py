"""The lab's teacher: the shipped one taken to half its sizes in a few minutes.

64 pixels (16 tokens) is new to it and 128 is its old low size: the gap between the two is the one that is closed. It
keeps the shipped autoencoder, so nothing else has to be made.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.embedded.data.dataset import META_FILE, PIXELS_FILE, RECORDS_FILE, PictureSet
from training.embedded.teacher_run import TeacherRun
from training.lab.grid import Grid


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
    if (target / PIXELS_FILE).is_file():
        return
    pictures = PictureSet.load(source)
    count, side = pictures.rgba.shape[:2]
    target.mkdir(parents=True, exist_ok=True)
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
    return run.export() if trainer.finished else None
