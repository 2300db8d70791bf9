"""What the teacher's loop reads: latents of every training picture on several grounds, and text tokens of its captions.

Both are encoded once, so that the loop itself runs nothing but the transformer.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from training.embedded.data.captions import GROUNDS, WHITE, compose_caption
from training.runtime.precision import native_autocast

TEXT_TOKENS = 24


@dataclass(frozen=True)
class TeacherData:
    """The encoded training set.

    Attributes:
        high: (N, G, 8, H, W) bfloat16 normalised latents at the full size; G grounds a picture, the first white.
        low: (N, G, 8, H/2, W/2), of the half-size pictures.
        tokens: (C, L, D) bfloat16 text tokens of the distinct captions; row 0 is the empty prompt.
        pooled: (C, D).
        captions_of: (N, G, V) rows of ``tokens`` that describe the picture on that ground.
        captions: the C texts.
    """

    high: Tensor
    low: Tensor
    tokens: Tensor
    pooled: Tensor
    captions_of: Tensor
    captions: list[str]

    def to(self, device: torch.device) -> TeacherData:
        """The same on another device."""
        names = ("high", "low", "tokens", "pooled", "captions_of")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def save(self, folder: Path) -> None:
        """Writes ``latents.safetensors`` and ``captions.json`` atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: getattr(self, name).contiguous() for name in ("high", "low", "tokens", "pooled", "captions_of")
        }
        save_file(tensors, folder / "latents.safetensors.part")
        (folder / "latents.safetensors.part").replace(folder / "latents.safetensors")
        part = folder / "captions.json.part"
        part.write_text(json.dumps(self.captions))
        os.replace(part, folder / "captions.json")

    @classmethod
    def load(cls, folder: Path) -> TeacherData:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder holds no encoded set.
        """
        path = folder / "latents.safetensors"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run `rmd train-teacher`, which encodes the pictures first")
        return cls(**load_file(path), captions=json.loads((folder / "captions.json").read_text()))


def encode_text(texts: Sequence[str], tokenizer: Any, encoder: Any, batch: int = 256) -> tuple[Tensor, Tensor]:
    """(n, ``TEXT_TOKENS``, D) token states, zero at padding, and their (n, D) means, bfloat16, on the CPU."""
    width = encoder.config.hidden_size
    tokens = torch.zeros(len(texts), TEXT_TOKENS, width, dtype=torch.bfloat16)
    pooled = torch.zeros(len(texts), width, dtype=torch.bfloat16)
    with torch.inference_mode():
        for start in range(0, len(texts), batch):
            rows = slice(start, start + batch)
            ids = tokenizer(
                list(texts[rows]), padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
            ).to(encoder.device)
            mask = ids["attention_mask"][..., None].float()
            states = encoder(**ids).last_hidden_state.float() * mask
            tokens[rows] = states.bfloat16()
            pooled[rows] = (states.sum(1) / mask.sum(1)).bfloat16()
    return tokens, pooled


def encode_training_set(
    records: Sequence[Any],
    rgba: Tensor,
    autoencoder: Any,
    tokenizer: Any,
    text_encoder: Any,
    *,
    grounds_each: int,
    captions_each: int,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda _what, _share: None,
) -> TeacherData:
    """Encodes pictures and captions, on the device of the networks; what comes back is on the CPU.

    Args:
        records: records with ``label``, ``tags`` and ``style``, aligned with ``rgba``.
        rgba: (N, H, W, 4) uint8.
        autoencoder: :class:`rmd.backbones.autoencoder.EmbeddedAutoencoder`; its ``encode`` gives normalised latents.
        grounds_each: grounds a picture, the first of them white.
        captions_each: captions a picture has on each ground; on white the first is the plain one.
        seed: of the grounds and the captions.
    """
    rng = random.Random(seed)
    coloured = [name for name in GROUNDS if name != WHITE]
    grounds = [[WHITE, *rng.sample(coloured, grounds_each - 1)] for _ in records]
    texts: list[str] = []
    captions_of = torch.zeros(len(records), grounds_each, captions_each, dtype=torch.int64)
    for n, record in enumerate(records):
        for g, ground in enumerate(grounds[n]):
            for v in range(captions_each):
                plain = g == 0 and v == 0
                text = compose_caption(record.label, record.style, record.tags, None if plain else rng, ground)
                captions_of[n, g, v] = len(texts)
                texts.append(text)
    texts.append("")
    unique = sorted(set(texts), key=len)
    row_of = {text: row for row, text in enumerate(unique)}
    rows = torch.tensor([row_of[text] for text in texts])
    tokens, pooled = encode_text(unique, tokenizer, text_encoder)
    progress("text", 1.0)

    high: list[Tensor] = []
    low: list[Tensor] = []
    device = next(autoencoder.parameters()).device
    colours = torch.tensor([[GROUNDS[name] for name in names] for names in grounds], device=device).float() / 255
    with torch.inference_mode():
        for start in range(0, len(records), 64):
            part = rgba[start : start + 64].to(device).float() / 255
            alpha = part[:, None, ..., 3:]
            backdrop = colours[start : start + 64, :, None, None, :]
            pixels = (part[:, None, ..., :3] * alpha + backdrop * (1 - alpha)).flatten(0, 1).permute(0, 3, 1, 2) * 2 - 1
            pixels = pixels.to(memory_format=torch.channels_last)
            for store, picture in ((high, pixels), (low, F.avg_pool2d(pixels, 2))):
                with native_autocast(pixels.device):
                    latent = autoencoder.encode(picture)
                store.append(latent.float().bfloat16().contiguous().unflatten(0, (-1, grounds_each)).cpu())
            progress("latents", min(1.0, (start + 64) / len(records)))
    return TeacherData(torch.cat(high), torch.cat(low), tokens, pooled, rows[captions_of], unique)
