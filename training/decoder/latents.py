"""What a decoder is distilled on: latents that the student itself makes, in shards on disk.

A shard is sampled whole or not at all, so an interrupted run goes on with the next one. Beside the finished latents a
shard holds the last prediction of every lower stage, which is what a preview decodes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rmd.backbones.base import Backbone
from rmd.cascade import Cascade, Step
from rmd.sampler import sample
from rmd.size import Size
from training.runtime.files import load_tensors, save_tensors, write_json

META_FILE = "latents.json"
SHARD = 128


def shard_file(folder: Path, number: int) -> Path:
    """The tensors of a shard; its prompts lie beside it as JSON, written last."""
    return folder / f"latents-{number:05d}.safetensors"


class LatentSource:
    """Draws the student's samples, each by its number alone: prompt, noise and so latents.

    Args:
        backbone: with the student's weights.
        cascade: that it runs.
        prompts: each is drawn once before any is drawn again.
        weights: digest of the student's denoiser, for the record.
        seed: of the order of the prompts and of the noise.
    """

    def __init__(
        self, backbone: Backbone, cascade: Cascade, prompts: Sequence[str], weights: str, seed: int = 0
    ) -> None:
        if not prompts:
            raise ValueError("no prompts to sample")
        self.backbone, self.cascade, self.seed = backbone, cascade, seed
        self.prompts = list(dict.fromkeys(prompts))
        random.Random(seed).shuffle(self.prompts)
        self.meta = {
            "backbone": backbone.name,
            "weights": weights,
            "cascade": cascade.to_dict(),
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16],
            "seed": seed,
        }

    def describe(self, number: int) -> tuple[str, int]:
        """Prompt and noise seed of sample ``number``."""
        return self.prompts[number % len(self.prompts)], self.seed * 1_000_003 + number

    def draw(self, first: int, count: int, batch: int) -> dict[str, Tensor]:
        """Samples ``first`` to ``first + count``.

        Returns:
            size, such as "256x256", -> (count, C, H, W) bfloat16 on the CPU.
        """
        parts: dict[str, list[Tensor]] = {}
        for start in range(first, first + count, batch):
            described = [self.describe(n) for n in range(start, min(start + batch, first + count))]
            for size, latents in self._sample([text for text, _ in described], [seed for _, seed in described]).items():
                parts.setdefault(str(size), []).append(latents.bfloat16().cpu())
        return {size: torch.cat(tensors) for size, tensors in parts.items()}

    def _sample(self, texts: list[str], seeds: list[int]) -> dict[Size, Tensor]:
        backbone, cascade = self.backbone, self.cascade
        found: dict[Size, Tensor] = {}

        def keep(_index: int, step: Step, x0_hat: Tensor) -> None:
            found[step.size] = x0_hat

        with torch.inference_mode():
            conditioning = backbone.encode_prompts(texts)
            uncond = None if cascade.guidance_scale == 1.0 else backbone.encode_unconditional(len(texts))
            found[cascade.full_size] = sample(backbone, cascade, conditioning, seeds, uncond, keep)
        return found


def write_shards(
    folder: Path,
    source: LatentSource,
    shards: int,
    *,
    shard: int = SHARD,
    batch: int = 8,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Adds the shards that are missing to a cache.

    Args:
        shards: how many there are to be.
        shard: samples of each.
        batch: prompts sampled together.
        progress: told the samples that are there and that are to be.
        stopped: asked before each shard; true ends the work.

    Returns:
        whether all are there.

    Raises:
        ValueError: the folder was made by another student, schedule, prompts or seed.
    """
    meta = {**source.meta, "shard": shard}
    if (folder / META_FILE).is_file() and json.loads((folder / META_FILE).read_text()) != meta:
        raise ValueError(
            f"{folder} holds latents of another student, schedule, prompts or seed: choose another --run, or remove it"
        )
    write_json(folder / META_FILE, meta)
    for number in range(shards):
        path = shard_file(folder, number)
        if not path.with_suffix(".json").is_file():
            if stopped():
                return False
            save_tensors(source.draw(number * shard, shard, batch), path)
            first = number * shard
            write_json(path.with_suffix(".json"), [source.describe(n) for n in range(first, first + shard)])
        progress((number + 1) * shard, shards * shard)
    return True


def read_shards(folder: Path, numbers: Sequence[int]) -> dict[Size, Tensor]:
    """The latents of some shards by size, ascending; (N, C, H, W) bfloat16.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    parts: dict[Size, list[Tensor]] = {}
    for number in numbers:
        path = shard_file(folder, number)
        if not path.with_suffix(".json").is_file():
            raise FileNotFoundError(f"{path} is not there: the latents of this run are not all made")
        for name, tensor in load_tensors(path).items():
            parts.setdefault(Size.parse(name), []).append(tensor)
    return {size: torch.cat(parts[size]) for size in sorted(parts)}
