"""The rendered pictures and their records, read from the cache that :mod:`training.embedded.data.build` writes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.embedded.data.captions import WHITE, compose_caption
from training.embedded.data.split import Split

PICTURE_SIZE = 256
PIXELS_FILE, RECORDS_FILE, META_FILE = "pictures.npy", "records.json", "meta.json"


@dataclass(frozen=True)
class Record:
    """One picture's description.

    Attributes:
        hexcode: code points in lower-case hexadecimal joined by dashes, without variation selectors.
        base_hexcode: the same without skin tones: the concept.
        style: ``"noto"``, ``"twemoji"``, ``"fluent flat"``, ``"fluent 3d"`` or that of a training-only set.
        label: short name in English.
        tags: further English words for it.
        group: emojibase's group number, None for components such as regional indicators.
        split: the set it belongs to.
        training_only: of a set that is trained on and never measured.
    """

    hexcode: str
    base_hexcode: str
    style: str
    label: str
    tags: tuple[str, ...]
    group: int | None
    split: Split
    training_only: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Record:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**fields, "tags": tuple(fields["tags"])})


def caption(record: Record, rng: random.Random | None = None, ground: str = WHITE) -> str:
    """``"<label>, <style> style"`` when ``rng`` is None, else a random variant (see `compose_caption`)."""
    return compose_caption(record.label, record.style, record.tags, rng, ground)


class PictureSet:
    """All pictures of a cache folder.

    Attributes:
        records: one a picture.
        rgba: (N, side, side, 4) uint8, straight alpha, memory-mapped; as `rmd data` writes it, side is `PICTURE_SIZE`.
        meta: package versions, digests and licences.
    """

    def __init__(self, records: Sequence[Record], rgba: NDArray[np.uint8], meta: dict[str, Any] | None = None) -> None:
        if len(records) != len(rgba):
            raise ValueError(f"{len(records)} records but {len(rgba)} pictures: run `rmd data --force`")
        self.records = list(records)
        self.rgba = rgba
        self.meta = meta or {}

    @classmethod
    def load(cls, root: Path | str = Path("data")) -> PictureSet:
        """Reads a cache folder.

        Raises:
            FileNotFoundError: the folder holds no finished cache.
        """
        root = Path(root)
        for name in (META_FILE, RECORDS_FILE, PIXELS_FILE):
            if not (root / name).is_file():
                raise FileNotFoundError(f"{root / name} is missing: run `rmd data --root {root}` first")
        records = [Record.from_dict(fields) for fields in json.loads((root / RECORDS_FILE).read_text())]
        rgba = np.load(root / PIXELS_FILE, mmap_mode="r", allow_pickle=False)
        return cls(records, rgba, json.loads((root / META_FILE).read_text()))

    def __len__(self) -> int:
        return len(self.records)

    def indices(self, *splits: Split) -> list[int]:
        """Positions of the pictures of the given splits, in order."""
        return [i for i, record in enumerate(self.records) if record.split in splits]

    def composite(
        self, i: int, background: tuple[int, int, int] = (255, 255, 255), size: int | None = None
    ) -> NDArray[np.uint8]:
        """Picture ``i`` over an opaque ground: (size, size, 3) uint8 RGB, its own size by default. Smaller sizes are
        area averages."""
        own = self.rgba.shape[1]
        size = size or own
        rgba = self.rgba[i].astype(np.float32)
        alpha = rgba[..., 3:] / 255
        flat = rgba[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)
        if size != own and own % size == 0:
            factor = own // size
            flat = flat.reshape(size, factor, size, factor, 3).mean((1, 3))
        pixels: NDArray[np.uint8] = (flat + 0.5).clip(0, 255).astype(np.uint8)
        if pixels.shape[0] != size:
            pixels = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS))
        return pixels
