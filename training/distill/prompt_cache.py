"""Encoded prompts on the disk, shared by runs: shards of 4,096 rows, memory-mapped, so that a set of any size is read a
few rows at a time.

A folder stands for one set of text encoders and tokenizers; in it a shard is named by its texts, so sets that begin
alike share shards, and a shard that is there is never made again. Rows behind a prompt's last token, where the network
sees none (masked, or zero), are not stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rmd.backbones.base import Backbone, Conditioning
from rmd.backbones.family import DiffusersBackbone
from training.distill.roles import fingerprint
from training.runtime.files import load_tensors, save_tensors

SHARD_ROWS = 4096
_MASK = "encoder_attention_mask"
_LENGTHS = "lengths."


def text_key(backbone: Backbone) -> str:
    """What an encoded prompt depends on: backbone, dtype, text encoders, tokenizers and text lengths."""
    modules = backbone.component_modules()
    encoders = [fingerprint(module) for name, module in modules.items() if name.startswith("text_encoder")]
    tokenizers = backbone.tokenizer_digest() if isinstance(backbone, DiffusersBackbone) else ""
    return _digest([backbone.name, str(backbone.dtype), tokenizers, *encoders])


class PromptCache:
    """The encoded prompts of one backbone's text encoders.

    Args:
        folder: of all caches.
        backbone: that encodes what is missing.
        negative: what guidance contrasts with, in place of the empty prompt.
    """

    def __init__(self, folder: Path, backbone: Backbone, negative: str | None = None) -> None:
        self.backbone, self.negative = backbone, negative
        self.folder = folder / text_key(backbone)

    def encode(
        self,
        texts: Sequence[str],
        *,
        rank: int = 0,
        processes: int = 1,
        batch: int = 128,
        progress: Callable[[float], None] = lambda _share: None,
    ) -> None:
        """Encode this process's part of the shards that are missing.

        Args:
            texts: distinct prompts, in an order of their own.
            rank, processes: every process takes each so manieth shard.
            progress: told the share that is done.
        """
        parts = list(_parts(texts))[rank::processes]
        for number, part in enumerate(parts):
            path = self._path(part)
            if not path.is_file():
                save_tensors(self._encoded(part, batch), path)
            progress((number + 1) / len(parts))
        if rank == 0 and not self._unconditional.is_file():
            negative, backbone = self.negative, self.backbone
            uncond = backbone.encode_prompts([negative]) if negative else backbone.encode_unconditional(1)
            save_tensors({name: value.cpu() for name, value in uncond.items()}, self._unconditional)

    def _encoded(self, texts: Sequence[str], batch: int) -> dict[str, Tensor]:
        # Where an encoder takes long prompts longer, neighbours of like length waste least.
        by_length = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        parts = []
        for start in range(0, len(texts), batch):
            encoded = self.backbone.encode_prompts([texts[row] for row in by_length[start : start + batch]])
            parts.append({name: value.cpu() for name, value in encoded.items()})
        place = torch.tensor(by_length).argsort()
        return packed({name: torch.cat([part[name] for part in parts])[place] for name in parts[0]})

    def open(self, texts: Sequence[str]) -> tuple[StoredConditions, Conditioning]:
        """The conditions of `texts`, all of them encoded, and those of the negative (or empty) prompt."""
        uncond = load_tensors(self._unconditional)
        shapes = {name: tuple(value.shape[1:]) for name, value in uncond.items()}
        return StoredConditions([self._path(part) for part in _parts(texts)], shapes), uncond

    @property
    def _unconditional(self) -> Path:
        return (
            self.folder / f"{f'negative-{_digest([self.negative])}' if self.negative else 'unconditional'}.safetensors"
        )

    def _path(self, texts: Sequence[str]) -> Path:
        return self.folder / f"{_digest(texts)}.safetensors"


class StoredConditions:
    """Rows of memory-mapped shards.

    Args:
        shards: files of `SHARD_ROWS` rows each, the last of fewer.
        shapes: of each condition's rows, as the network takes them.
    """

    def __init__(self, shards: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._files: list[Any] = [safe_open(str(path), framework="pt") for path in shards]
        self._shapes = dict(shapes)
        self._ends: list[dict[str, Tensor]] = [
            {name: file.get_tensor(_LENGTHS + name).cumsum(0) for name in shapes if _LENGTHS + name in set(file.keys())}
            for file in self._files
        ]

    def rows(self, rows: Tensor) -> Conditioning:
        """The conditions of these rows, on the CPU."""
        places = [divmod(int(row), SHARD_ROWS) for row in rows]
        return {name: torch.stack([self._row(name, shard, row) for shard, row in places]) for name in self._shapes}

    def _row(self, name: str, shard: int, row: int) -> Tensor:
        values = self._files[shard].get_slice(name)
        ends = self._ends[shard].get(name)
        if ends is None:
            fixed: Tensor = values[row : row + 1][0]
            return fixed
        start, end = int(ends[row - 1]) if row else 0, int(ends[row])
        held: Tensor = values[start:end]
        padded = held.new_zeros(self._shapes[name])
        padded[: len(held)] = held
        return padded


def packed(conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Conditions of several prompts as they are stored: of (B, L, D) ones the rows that the network sees, one prompt
    after the other (sum of lengths, D), with the lengths (B,) beside them; all others as they are."""
    stored = {}
    for name, value in conditions.items():
        if value.ndim != 3:
            stored[name] = value
            continue
        seen = conditions[_MASK] != 0 if _MASK in conditions else (value != 0).any(-1)
        lengths = (seen * torch.arange(1, value.shape[1] + 1)).amax(1)
        stored[name] = torch.cat([row[:length] for row, length in zip(value, lengths.tolist(), strict=True)])
        stored[_LENGTHS + name] = lengths
    return stored


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), SHARD_ROWS):
        yield texts[start : start + SHARD_ROWS]


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]
