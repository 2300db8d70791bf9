"""A LoRA's factors under the names that others read: diffusers', peft's, and kohya's with the first code's blocks.

| format | read by |
|---|---|
| diffusers | diffusers' ``load_lora_weights`` (not of PixArt); ComfyUI, but for Wan |
| kohya | ComfyUI, kohya's tools and those that read their files (not of PixArt); diffusers, but for SD3 |
| peft | peft, and ComfyUI for PixArt |

Every scale is one: alpha is the rank, and is written wherever a format has a place for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rmd.published.factors import Factors
from rmd.published.naming import sd3_originals

LoraFormat = Literal["diffusers", "kohya", "peft"]
_KOHYA = "lora_unet_"


def default_format(family: str) -> LoraFormat:
    """diffusers', where its pipelines read LoRAs at all."""
    return "peft" if family == "pixart" else "diffusers"


def check_format(layout: LoraFormat, family: str) -> None:
    """Refuse a format that nobody reads for that family.

    Raises:
        ValueError: it is one.
    """
    if layout == "diffusers" and family == "pixart":
        raise ValueError("--format diffusers: diffusers' PixArt pipelines read no LoRA; give --format peft")
    if layout == "kohya" and family not in ("sdxl", "sd3", "wan"):
        raise ValueError(f"--format kohya: it has no names for {family}; give --format {default_format(family)}")


def named(
    modules: Mapping[str, Factors],
    layout: LoraFormat,
    family: str,
    component: str,
    config: Mapping[str, Any],
    known: Sequence[str],
) -> dict[str, Tensor]:
    """The tensors of a LoRA file.

    Args:
        modules: factors by the denoiser's own module names.
        layout, family: the names wanted, and whose.
        component: the denoiser's sub-folder.
        config: its configuration.
        known: all modules that it has.
    """
    if layout == "kohya":
        return dict(_kohya(modules, family, component, config, known))
    prefix = "base_model.model." if layout == "peft" else f"{component}."
    state = {}
    for module, factors in modules.items():
        state[f"{prefix}{module}.lora_A.weight"] = factors.down
        state[f"{prefix}{module}.lora_B.weight"] = factors.up
    return state


def _kohya(
    modules: Mapping[str, Factors], family: str, component: str, config: Mapping[str, Any], known: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    if family == "sd3":
        renamed = _sd3(modules, component, known)
    elif family == "wan":
        renamed = {wan_first_name(module): factors for module, factors in modules.items()}
    else:
        layers = config["layers_per_block"]
        renamed = {sdxl_first_name(module, layers): factors for module, factors in modules.items()}
    for name, factors in renamed.items():
        flat = _KOHYA + name.replace(".", "_")
        yield f"{flat}.lora_down.weight", factors.down
        yield f"{flat}.lora_up.weight", factors.up
        yield f"{flat}.alpha", torch.tensor(float(factors.rank))


_SDXL_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
_SDXL_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def sdxl_first_name(module: str, layers: int) -> str:
    """A module of diffusers' UNet, with so many layers a block, as the code that SDXL came with calls it."""
    if module in _SDXL_OUTSIDE:
        return _SDXL_OUTSIDE[module]
    match = re.match(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)$", module)
    assert match is not None, module
    side, block, kind, layer, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        rest = _SDXL_RESNET.get(rest, rest).replace("conv_shortcut", "skip_connection")
    span = layers + 1  # a block's layers and its change of size
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{span * (block + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{span * block + layers}.2.{rest}"
    number = span * block + layer + (1 if side == "down" else 0)
    return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{1 if kind == 'attentions' else 0}.{rest}"


_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
_WAN_BLOCK = (
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_out.0", ".o"),
    (".to_", "."),
    (".ffn.net.0.proj", ".ffn.0"),
    (".ffn.net.2", ".ffn.2"),
)


def wan_first_name(module: str) -> str:
    """A module of diffusers' Wan as the code that it came with calls it."""
    for ours, first in _WAN_BLOCK:
        module = module.replace(ours, first)
    return _WAN.get(module, module)


def _sd3(modules: Mapping[str, Factors], component: str, known: Sequence[str]) -> dict[str, Factors]:
    """SD3's first names, its query, key and value fused: their factors stand in blocks, of three times the rank."""
    renamed: dict[str, Factors] = {}
    placed: set[str] = set()
    for original, places in sd3_originals(component, list(known)):
        parts = [modules.get(place.module) for place in places]
        present = [part for part in parts if part is not None]
        if not present:
            continue
        if len(places) == 1:
            renamed[original] = Factors(present[0].down, places[0].rows(present[0].up))
        else:
            renamed[original] = _fused(parts)
        placed |= {place.module for place in places}
    if left := modules.keys() - placed:
        raise ValueError(f"--format kohya: the first code has no name for {', '.join(sorted(left))}")
    return renamed


def _fused(parts: list[Factors | None]) -> Factors:
    first = next(part for part in parts if part is not None)
    empty = Factors(first.down[:0], first.up[:, :0])
    whole = [part or empty for part in parts]
    return Factors(torch.cat([part.down for part in whole]), torch.block_diag(*(part.up for part in whole)))  # type: ignore[no-untyped-call]
