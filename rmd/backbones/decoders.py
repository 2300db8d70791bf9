"""Small decoders: another network than a checkpoint's own autoencoder, from the same latents to pictures or films.

A decoder is a folder of its own, with ``config.json`` and safetensors, whose class is one of diffusers': nothing else
is loaded, and no code from the folder is run. What it must be follows from the checkpoint, and is checked before its
weights are read.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmd.backbones.base import BackboneError
from rmd.backbones.config_types import check_config
from rmd.backbones.folder import read_object
from rmd.backbones.random_weights import resolve
from rmd.backbones.tiny_decoder import COLOURS
from rmd.checkpoint import DECODER_RECORD
from rmd.weight_files import folder_digest

TINY = "diffusers:AutoencoderTiny"
WAN = "diffusers:AutoencoderKLWan"
# Of two Wan autoencoders with these in common, one can decode what the other has encoded.
_WAN_LATENTS = ("z_dim", "latents_mean", "latents_std", "scale_factor_temporal", "scale_factor_spatial", "patch_size")


def read_small_decoder(
    folder: Path, target: str, backbone: str, channels: int, compression: int, source: Path, own: Mapping[str, Any]
) -> dict[str, Any]:
    """The configuration of the decoder in a folder, checked against the checkpoint that it is to decode for.

    Args:
        folder: of the decoder.
        target: the class that the backbone takes, :data:`TINY` or :data:`WAN`.
        backbone: the backbone's name.
        channels: of its latents.
        compression: pixels a latent position, along one side.
        source: the folder of the checkpoint's own autoencoder.
        own: that autoencoder's configuration.

    Raises:
        BackboneError: no such folder, another class, a value that it does not take, or latents of other channels, size
            or scaling; the message names the folder, what it has and what is expected.
    """
    if not folder.is_dir():
        raise BackboneError(f"the decoder {folder} is not a folder; give one with a config.json, or 'full'")
    if not (folder / "config.json").is_file():
        raise BackboneError(f"the decoder {folder} has no config.json; give what save_pretrained wrote, or 'full'")
    config = read_object(folder / "config.json")
    wanted = target.split(":")[1]
    if config.get("_class_name") != wanted:
        raise BackboneError(
            f"the decoder {folder} is of class {config.get('_class_name')!r}; {backbone} takes {wanted} of diffusers"
        )
    check_config(folder / "config.json", config, target)
    wrong = (
        _wrong_tiny(_complete(target, config), channels, compression, own)
        if target == TINY
        else _wrong_wan(_complete(target, config), _complete(target, own))
    )
    if wrong:
        raise BackboneError(f"the decoder {folder} does not fit {backbone}: {'; '.join(wrong)}")
    _check_record(folder, source)
    return config


def _complete(target: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the class's own defaults for what a file leaves out."""
    parameters = inspect.signature(resolve(target).__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return {**defaults, **config}


def _wrong_tiny(config: Mapping[str, Any], channels: int, compression: int, own: Mapping[str, Any]) -> list[str]:
    wrong = []
    if config["latent_channels"] != channels:
        wrong.append(f"latent_channels is {config['latent_channels']}, expected {channels}")
    try:
        colours, levels = int(config["out_channels"]), len(config["num_decoder_blocks"])
        patch = math.isqrt(colours // COLOURS)
        side = int(config["upsampling_scaling_factor"]) ** (levels - 1) * patch
        found = float(config["scaling_factor"]), float(config["shift_factor"] or 0.0)
    except (TypeError, ValueError):
        return [*wrong, "config.json does not hold the numbers of an AutoencoderTiny"]
    if patch < 1 or colours != COLOURS * patch**2:
        wrong.append(f"out_channels is {colours}, expected 3, or 3 p^2 for packed pixels")
    elif side != compression:
        wrong.append(f"it draws {side} pixels a latent position along a side, expected {compression}")
    # In the denoiser's space, or in the one that the checkpoint's own autoencoder scales back to.
    spaces = {(1.0, 0.0)}
    if "scaling_factor" in own:
        spaces.add((float(own["scaling_factor"]), float(own.get("shift_factor") or 0.0)))
    if not any(all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(found, space, strict=True)) for space in spaces):
        expected = " or ".join(f"{scale:g} and {shift:g}" for scale, shift in sorted(spaces, reverse=True))
        wrong.append(f"scaling_factor and shift_factor are {found[0]:g} and {found[1]:g}, expected {expected}")
    return wrong


def _wrong_wan(config: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {_short(config.get(name))}, expected {_short(own.get(name))}"
        for name in _WAN_LATENTS
        if _listed(config.get(name)) != _listed(own.get(name))
    ]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    return f"[{value[0]:g}, ...]" if isinstance(value, list | tuple) and value else str(value)


def _check_record(folder: Path, source: Path) -> None:
    """A decoder that `rmd distill-decoder` made names the autoencoder it was distilled from."""
    if not (folder / DECODER_RECORD).is_file():
        return
    recorded = read_object(folder / DECODER_RECORD).get("autoencoder")
    if recorded is not None and recorded != folder_digest(source):
        raise BackboneError(
            f"the decoder {folder} was distilled from another autoencoder than the one in {source}: distil one for it "
            f"(rmd distill-decoder); if it is the same one in another dtype, remove 'autoencoder' from {DECODER_RECORD}"
        )


TAESD_SHAPE = ((3, 3, 3, 1), 64)
"""Residual blocks a level and channels of the published decoders of this class."""
# At 256 px and batch 1 on one thread 4.5 (bfloat16) to 7.5 times (float32) as fast as the autoencoder's own decoder.
_SHAPES = {"embedded": ((2,), 64), "embedded-video": ((2,), 64)}


def default_shape(backbone: str) -> tuple[tuple[int, ...], int]:
    """Residual blocks a level, and channels, of the small decoder that suits a backbone."""
    return _SHAPES.get(backbone, TAESD_SHAPE)


def small_decoder_config(
    channels: int, compression: int, blocks: tuple[int, ...] = (3, 3, 3, 1), width: int = 64
) -> dict[str, Any]:
    """The configuration of an ``AutoencoderTiny`` for latents of the denoiser's own scale.

    Args:
        channels: of the latents.
        compression: pixels a latent position, along one side; what the levels do not double is packed.
        blocks: residual blocks at each level, from the latents' size up; the defaults are taesd's.
        width: channels of every level.

    Raises:
        ValueError: the levels double more often than that.
    """
    doubled = 2 ** (len(blocks) - 1)
    if not blocks or compression % doubled:
        raise ValueError(f"{len(blocks)} levels of blocks do not make {compression} pixels a latent position")
    return {
        "latent_channels": channels,
        "out_channels": COLOURS * (compression // doubled) ** 2,
        "decoder_block_out_channels": [width] * len(blocks),
        "num_decoder_blocks": list(blocks),
        # The class has an encoder as well; this project never encodes with it.
        "encoder_block_out_channels": [8, 8, 8, 8],
        "num_encoder_blocks": [0, 0, 0, 0],
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
