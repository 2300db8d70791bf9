"""The compared rows, and their pictures: generated once, kept in a cache that a stopped run goes on from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmd.backbones.base import Backbone
from rmd.cascade import Cascade, teacher_cascade
from rmd.checkpoint import TeacherSpec
from rmd.sampler import sample

Pictures = NDArray[np.uint8]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Row:
    """One line of the table: whose weights run which cascade.

    Attributes:
        key: short name, as in ``--rows``.
        title: for people.
        weights: "teacher" or "student".
        cascade: with its guidance scale.
        seeds: sampling seeds.
    """

    key: str
    title: str
    weights: str
    cascade: Cascade
    seeds: tuple[int, ...]

    @property
    def evaluations(self) -> int:
        """Forward passes a picture: two a step under guidance."""
        return self.cascade.num_steps * (1 if self.cascade.guidance_scale == 1.0 else 2)


def build_rows(
    keys: Sequence[str],
    cascades: Mapping[str, Cascade],
    backbone: Backbone,
    teacher: TeacherSpec,
    seeds: Sequence[int],
    *,
    teacher_steps: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[Row]:
    """The rows called ``keys``: "teacher", "student-<schedule>" or "naive-<schedule>" (teacher's weights, guided).

    Args:
        cascades: the student's schedules by name.
        backbone: for the teacher's own schedule.
        teacher: its steps and guidance scale.
        seeds: of students and naive rows; the teacher is sampled once, with the first of them.
        teacher_steps: instead of the teacher's own number.
        overrides: fields of :class:`Cascade` replaced in every row but the teacher's (an ablation).

    Raises:
        ValueError: an unknown row or schedule.
    """
    if not seeds:
        raise ValueError("give at least one seed")
    rows: list[Row] = []
    for key in keys:
        kind, _, schedule = key.partition("-")
        if key == "teacher":
            steps = teacher_steps or teacher.steps
            cascade = replace(teacher_cascade(backbone, steps), guidance_scale=teacher.guidance_scale)
            title = f"teacher, {steps} steps, guidance {teacher.guidance_scale:g}"
            rows.append(Row(key, title, "teacher", cascade, (seeds[0],)))
            continue
        if kind not in ("student", "naive") or schedule not in cascades:
            known = ", ".join(["teacher", *(f"{kind}-{name}" for kind in ("student", "naive") for name in cascades)])
            raise ValueError(f"unknown row {key!r}; this checkpoint has {known}")
        cascade = replace(cascades[schedule], **(overrides or {}))
        if kind == "naive":
            cascade = replace(cascade, guidance_scale=teacher.guidance_scale)
            title = f"naive {schedule}: teacher's weights, guidance {teacher.guidance_scale:g}, no distillation"
            rows.append(Row(key, title, "teacher", cascade, tuple(seeds)))
        else:
            guidance = "no guidance" if cascade.guidance_scale == 1 else f"guidance {cascade.guidance_scale:g}"
            rows.append(Row(key, f"student {schedule}, {guidance}", "student", cascade, tuple(seeds)))
    return rows


class PictureCache:
    """Generated pictures by what made them: weights, cascade, prompts and seeds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, identity: Mapping[str, Any]) -> Path:
        """The file of ``identity``."""
        text = json.dumps(identity, sort_keys=True)
        return self.folder / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"

    def load(self, path: Path) -> NDArray[Any] | None:
        """The array in ``path``; None when it is absent or cannot be read."""
        try:
            array: NDArray[Any] = np.load(path, allow_pickle=False)
        except (OSError, ValueError):
            return None
        return array

    def save(self, path: Path, array: NDArray[Any]) -> None:
        """Write ``array`` atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}-{os.getpid()}.npy")
        np.save(scratch, array, allow_pickle=False)
        os.replace(scratch, path)


def to_uint8(pixels: Tensor) -> Pictures:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8; films (B, 3, T, H, W) -> (B, T, H, W, 3)."""
    array: Pictures = (pixels.clamp(0, 1) * 255 + 0.5).to(torch.uint8).movedim(1, -1).contiguous().cpu().numpy()
    return array


def generate(
    backbone: Backbone,
    weights: str,
    cascade: Cascade,
    prompts: Sequence[str],
    seeds: Sequence[int],
    cache: PictureCache,
    *,
    batch: int = 64,
    progress: Progress = lambda _count: None,
) -> Pictures:
    """Pictures or films of ``prompts`` through ``cascade``.

    Args:
        weights: digest of the backbone's denoiser: part of the cache's key.
        seeds: one a prompt.
        batch: prompts at a time, and in one file of the cache.
        progress: called with the number of pictures of each finished batch.

    Returns:
        (N, H, W, 3) uint8; films (N, T, H, W, 3).
    """
    parts: list[Pictures] = []
    for start in range(0, len(prompts), batch):
        texts, chunk = list(prompts[start : start + batch]), list(seeds[start : start + batch])
        path = cache.path(
            "pictures", {"weights": weights, "cascade": cascade.to_dict(), "prompts": texts, "seeds": chunk}
        )
        pictures = cache.load(path)
        if pictures is None:
            pictures = to_uint8(_sample(backbone, cascade, texts, chunk, first=False)[0])
            cache.save(path, pictures)
        parts.append(pictures)
        progress(len(texts))
    return np.concatenate(parts)


def generate_with_first_stage(
    backbone: Backbone, cascade: Cascade, prompts: Sequence[str], seeds: Sequence[int]
) -> tuple[Pictures, Pictures]:
    """Finished pictures, and the first stage's last prediction decoded at its own size; not cached."""
    pictures, first = _sample(backbone, cascade, list(prompts), list(seeds), first=True)
    return to_uint8(pictures), to_uint8(first)


def _sample(
    backbone: Backbone, cascade: Cascade, prompts: list[str], seeds: list[int], first: bool
) -> tuple[Tensor, Tensor]:
    conditioning = backbone.encode_prompts(prompts)
    uncond = None if cascade.guidance_scale == 1.0 else backbone.encode_unconditional(len(prompts))
    last_of_first = len(cascade.stages[0].steps) - 1
    kept: list[Tensor] = []

    def keep(index: int, _step: object, x0_hat: Tensor) -> None:
        if index == last_of_first:
            kept.append(x0_hat)

    with torch.inference_mode():
        latents = sample(backbone, cascade, conditioning, seeds, uncond, keep)
        pictures = backbone.decode(latents, cascade.full_size)
        if not first or cascade.stages[0].size == cascade.full_size:
            return pictures, pictures
        return pictures, backbone.decode(kept[0], cascade.stages[0].size)


def reconstruct(autoencoder: Any, pictures: Pictures, batch: int = 64) -> Pictures:
    """Pictures through the autoencoder and back: what no model on its latents can exceed.

    Args:
        autoencoder: with ``encode`` and ``decode`` (:class:`rmd.backbones.autoencoder.EmbeddedAutoencoder`).
        pictures: (N, H, W, 3) uint8.
    """
    parameter = next(autoencoder.parameters())
    parts: list[Pictures] = []
    with torch.inference_mode():
        for start in range(0, len(pictures), batch):
            pixels = torch.as_tensor(pictures[start : start + batch]).permute(0, 3, 1, 2).to(parameter) / 127.5 - 1
            decoded = autoencoder.decode(autoencoder.encode(pixels)).float()
            parts.append(to_uint8(decoded * 0.5 + 0.5))
    return np.concatenate(parts)


def psnr(a: Pictures, b: Pictures) -> float:
    """Mean peak signal-to-noise ratio over pictures, in dB; 99 for equal ones."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean((1, 2, 3))
    return float(np.minimum(99.0, 10 * np.log10(255.0**2 / np.maximum(error, 1e-6))).mean())
