"""What the film teacher's loop reads: latents and text tokens of films and single pictures, in shards on disk.

A shard is rendered and encoded whole or not at all, so an interrupted run goes on with the next one, and a training may
begin while further shards are made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmd.backbones.autoencoder import EmbeddedAutoencoder
from rmd.backbones.embedded import EmbeddedBackbone
from rmd.dtypes import native_dtype
from training.embedded.data.films import FRAMES, RULES, FilmSource, FilmSpec, render_films
from training.runtime.files import load_tensors, save_tensors, write_json
from training.runtime.precision import native_autocast

Kind = Literal["films", "pictures"]
SIDES = (144, 96)
SHARD = {"films": 250, "pictures": 1000}
META_FILE = "films.json"


class FilmEncoder:
    """Renders and encodes films with the embedded model's autoencoder and text encoder.

    Args:
        model: the folder of an embedded checkpoint.
        device: where the networks run.
    """

    def __init__(self, model: Path, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.backbone = EmbeddedBackbone.load(model, dtype=native_dtype(device), device=device)
        autoencoder = EmbeddedAutoencoder.from_pretrained(str(model), subfolder="vae", use_safetensors=True).eval()
        self.autoencoder = autoencoder.to(self.device, memory_format=torch.channels_last)

    def fits(self, caption: str) -> bool:
        """Whether the text encoder sees the whole caption."""
        tokens = self.backbone.tokenize("tokenizer", [f"{caption} !"])["attention_mask"].sum()
        return int(tokens) < self.backbone.tokenizers["tokenizer"]

    @torch.inference_mode()
    def encode(
        self, specs: Sequence[FilmSpec], rgba: NDArray[np.uint8], sides: Sequence[int] = SIDES, frames: int = FRAMES
    ) -> dict[str, Tensor]:
        """``latents_<side>`` (N, 8, frames, side/8, side/8) for each side, ``tokens`` (N, 24, 384) and ``pooled``
        (N, 384); all bfloat16 on the CPU."""
        text = self.backbone.encode_prompts([spec.caption for spec in specs])
        parts: dict[str, list[Tensor]] = {f"latents_{side}": [] for side in sides}
        batch = max(1, 72 // frames)
        for start in range(0, len(specs), batch):
            for side, films in zip(sides, render_films(specs[start : start + batch], rgba, sides, frames), strict=True):
                flat = films.transpose(1, 2).flatten(0, 1).to(self.device, memory_format=torch.channels_last)
                with native_autocast(self.device):
                    latents = self.autoencoder.encode(flat)
                latents = latents.float().bfloat16().cpu().unflatten(0, (-1, frames)).transpose(1, 2)
                parts[f"latents_{side}"].append(latents.contiguous())
        return {
            **{name: torch.cat(values) for name, values in parts.items()},
            "tokens": text["encoder_hidden_states"].bfloat16().cpu(),
            "pooled": text["pooled_projections"].bfloat16().cpu(),
        }


def shard_file(folder: Path, kind: Kind, number: int) -> Path:
    """The tensors of a shard; its captions lie beside it as JSON, written last."""
    return folder / f"{kind}-{number:05d}.safetensors"


def write_shards(
    folder: Path,
    source: FilmSource,
    encoder: FilmEncoder,
    *,
    films: int,
    pictures: int,
    sides: Sequence[int] = SIDES,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Adds what is missing to a cache: ``films`` films and ``pictures`` single pictures, in whole shards.

    Pictures come first: there are few of them.

    Raises:
        ValueError: the folder was made from other pictures, rules, sides or seed.
    """
    meta = {
        "pictures": source.pictures.meta,
        "split": source.split,
        "seed": source.seed,
        "rules": RULES,
        "sides": list(sides),
        "frames": FRAMES,
    }
    if (folder / META_FILE).is_file() and json.loads((folder / META_FILE).read_text()) != meta:
        raise ValueError(f"{folder} holds films of other pictures, rules, sides or seed: choose another folder")
    write_json(folder / META_FILE, meta)
    jobs: list[tuple[Kind, int]] = [("pictures", n) for n in range(-(-pictures // SHARD["pictures"]))]
    jobs += [("films", n) for n in range(-(-films // SHARD["films"]))]
    done, total = 0, sum(SHARD[kind] for kind, _ in jobs)
    for kind, number in jobs:
        path = shard_file(folder, kind, number)
        if not path.with_suffix(".json").is_file():
            if stopped():
                return
            first = number * SHARD[kind]
            draw = source.film if kind == "films" else source.picture
            specs = [draw(i) for i in range(first, first + SHARD[kind])]
            frames = FRAMES if kind == "films" else 1
            save_tensors(encoder.encode(specs, source.pictures.rgba, sides, frames), path)
            write_json(path.with_suffix(".json"), [spec.to_dict() for spec in specs])
        done += SHARD[kind]
        progress(done, total)


@dataclass
class FilmBatch:
    """Some films or pictures.

    Attributes:
        latents: (B, 8, T, H, W) float32.
        tokens: (B, 24, 384).
        pooled: (B, 384).
    """

    latents: Tensor
    tokens: Tensor
    pooled: Tensor


class FilmData:
    """The shards of a cache in memory, on one device; :meth:`refresh` takes up new ones.

    Args:
        folder: as :func:`write_shards` fills it.
        device: where the tensors lie.

    Raises:
        FileNotFoundError: there are no films or no pictures yet.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = folder, torch.device(device)
        self.shards: dict[Kind, list[dict[str, Tensor]]] = {"films": [], "pictures": []}
        self.refresh()
        for kind, shards in self.shards.items():
            if not shards:
                raise FileNotFoundError(f"{folder} holds no encoded {kind}: run `rmd data --films` first")

    def refresh(self) -> int:
        """Reads the shards that were not there before; returns the number of films."""
        for kind, shards in self.shards.items():
            while (path := shard_file(self.folder, kind, len(shards))).with_suffix(".json").is_file():
                shards.append({name: tensor.to(self.device) for name, tensor in load_tensors(path).items()})
        return sum(len(shard["tokens"]) for shard in self.shards["films"])

    def draw(self, kind: Kind, side: int, count: int, random: torch.Generator) -> FilmBatch:
        """``count`` films or pictures drawn evenly.

        Raises:
            KeyError: the cache was not made at this side.
        """
        shards = self.shards[kind]
        places = torch.randint(len(shards) * SHARD[kind], (count,), generator=random, device=self.device).tolist()
        rows = [(shards[place // SHARD[kind]], place % SHARD[kind]) for place in places]
        return FilmBatch(
            torch.stack([shard[f"latents_{side}"][row] for shard, row in rows]).float(),
            torch.stack([shard["tokens"][row] for shard, row in rows]),
            torch.stack([shard["pooled"][row] for shard, row in rows]),
        )


def write_prompts(folder: Path) -> int:
    """Writes ``prompts.txt``, the captions of a cache's films, one a line; returns their number."""
    captions: list[str] = []
    while (path := shard_file(folder, "films", len(captions) // SHARD["films"])).with_suffix(".json").is_file():
        captions += [spec["caption"] for spec in captions_of(path)]
    scratch = folder / "prompts.txt.partial"
    scratch.write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
    scratch.replace(folder / "prompts.txt")
    return len(captions)


def captions_of(path: Path) -> list[dict[str, Any]]:
    """The specifications of a shard's films, in order."""
    specs: list[dict[str, Any]] = json.loads(path.with_suffix(".json").read_text())
    return specs
