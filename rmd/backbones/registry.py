"""The known backbones by name, and checkpoint folders to backbones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rmd.backbones.base import Backbone, BackboneError

if TYPE_CHECKING:
    from rmd.checkpoint import CheckpointFolder


class _Registry(Mapping[str, type[Backbone]]):
    """Name -> class, imported when first asked for: listing names must not import diffusers."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)

    def __getitem__(self, name: str) -> type[Backbone]:
        module, attribute = self._places[name].split(":")
        found: type[Backbone] = getattr(import_module(module), attribute)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


BACKBONES: Mapping[str, type[Backbone]] = _Registry(
    {
        "embedded": "rmd.backbones.embedded:EmbeddedBackbone",
        "embedded-video": "rmd.backbones.embedded_video:EmbeddedVideoBackbone",
        "sdxl": "rmd.backbones.sdxl:SDXLBackbone",
        "pixart": "rmd.backbones.pixart:PixArtBackbone",
        "sd3": "rmd.backbones.sd3:SD3Backbone",
        "wan-1.3b": "rmd.backbones.wan:Wan1p3BBackbone",
        "wan-14b": "rmd.backbones.wan:Wan14BBackbone",
    }
)


def get_backbone(name: str) -> type[Backbone]:
    """The backbone class called ``name``.

    Raises:
        BackboneError: unknown name; the message lists the known ones.
    """
    if name not in BACKBONES:
        raise BackboneError(f"unknown backbone {name!r}; known are {', '.join(BACKBONES)}")
    return BACKBONES[name]


def load_checkpoint(
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    weights: bool = True,
    decoder: Path | str | None = None,
) -> tuple[Backbone, CheckpointFolder]:
    """Reads a distilled checkpoint folder: its backbone, loaded, and its cascades and teacher.

    Args:
        folder: a diffusers folder with a ``cascade.json``.
        dtype: the dtype of the networks.
        device: where they run.
        weights: False leaves the networks on the meta device (see :meth:`Backbone.load`).
        decoder: a small decoder's folder or "full"; what the checkpoint names when None.

    Raises:
        BackboneError: the checkpoint names an unknown backbone, or its folder cannot be read.
    """
    from rmd.checkpoint import CheckpointFolder

    checkpoint = CheckpointFolder.read(Path(folder)).with_decoder(decoder)
    backbone = get_backbone(checkpoint.backbone_name).load(
        Path(folder), dtype=dtype, device=device, weights=weights, decoder=checkpoint.decoder_path
    )
    return backbone, checkpoint
