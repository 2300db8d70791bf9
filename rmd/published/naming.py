"""Names of LoRA modules to the parameters that they change, in whichever of the published namings.

A file calls the module ``down_blocks.1.attentions.0.proj_in`` so, or ``lora_unet_input_blocks_4_1_proj_in``, or by its
name in the code that the model was first published with. Names that diffusers converts are converted by diffusers, one
module at a time: given a whole file, its converters drop what they do not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_DENOISER_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")
_KOHYA_DENOISER = ("lora_unet_", "lora_transformer_")
_TEXT = re.compile(r"^(?:lora_te(?P<kohya>[123]?)_|text_encoder(?P<number>_[123])?\.)(?P<rest>.+)$")
TEXT_WRAPPER = "text_model."
"""What stands between a CLIP's own modules and the names of files: transformers has had it both ways."""


@dataclass(frozen=True)
class Place:
    """What a published module stands for in a network's own names.

    Attributes:
        component: the sub-folder of the network, such as "unet".
        module: its module, or a parameter outright.
        third: of a module that the publisher fused from three, which one this is; None for the whole.
        halves_swapped: the publisher's rows come as (shift, scale) where diffusers has (scale, shift).
    """

    component: str
    module: str
    third: int | None = None
    halves_swapped: bool = False

    def rows(self, tensor: Tensor) -> Tensor:
        """This place's rows of the published module's tensor (first dimension)."""
        if self.third is not None:
            return tensor.chunk(3, dim=0)[self.third]
        if self.halves_swapped:
            return torch.cat(tensor.chunk(2, dim=0)[::-1])
        return tensor


class Names:
    """Finds the places of published module names.

    Args:
        denoiser: its sub-folder, "unet" or "transformer".
        parameters: sub-folder -> names of the parameters in it; the networks that a LoRA may change.
        family: the backbone's profile: "sdxl", "sd3", "wan", ...
        config: the denoiser's configuration.
    """

    def __init__(
        self, denoiser: str, parameters: Mapping[str, tuple[str, ...]], family: str, config: Mapping[str, Any]
    ) -> None:
        self._denoiser = denoiser
        self._family = family
        self._config = config
        self._places: dict[str, dict[str, tuple[Place, ...]]] = {}
        for component, names in parameters.items():
            found = self._places[component] = {}
            modules = dict.fromkeys(part for name in names for part in (_module_of(name), name))
            for module in modules:
                place = (Place(component, module),)
                found[_flat(module)] = place
                if component != denoiser:
                    plain = module.removeprefix(TEXT_WRAPPER)
                    found[_flat(plain)] = found[_flat(TEXT_WRAPPER + plain)] = place
            if component == denoiser and family == "sd3":
                for original, places in sd3_originals(component, list(modules)):
                    found.setdefault(_flat(original), places)

    def find(self, name: str) -> tuple[Place, ...]:
        """The places of a module's published name; none when no network here has it."""
        text = _TEXT.match(name)
        if text:
            number = text["kohya"] or (text["number"] or "").lstrip("_")
            component = "text_encoder" if number in ("", "1") else f"text_encoder_{number}"
            return self._places.get(component, {}).get(_flat(text["rest"]), ())
        places = self._places[self._denoiser]
        for rest in _without_prefixes(name):
            found = places.get(_flat(rest)) or places.get(_flat(self._converted(rest)))
            if found:
                return found
        return ()

    def _converted(self, name: str) -> str:
        """The name as diffusers' converters of this family give it; as it is where they do not know it."""
        try:
            if self._family == "sdxl":
                return _sdxl_original(_flat(name), self._config)
            if self._family == "wan":
                return _wan_original(name)
        except (ValueError, KeyError, IndexError):  # the converters take any name for one of theirs
            pass
        return name


def _flat(name: str) -> str:
    """kohya's way: no dots. No two modules of one network differ by that alone (a test holds it for the full sizes)."""
    return name.replace(".", "_")


def _module_of(parameter: str) -> str:
    return re.sub(r"\.(weight|bias)$", "", parameter)


def _without_prefixes(name: str) -> Iterator[str]:
    """The name, and what is left of it as its prefixes are taken away one by one."""
    yield name
    for prefix in _KOHYA_DENOISER:
        if name.startswith(prefix):
            yield name.removeprefix(prefix)
    changed = True
    while changed:
        changed = False
        for prefix in _DENOISER_PREFIXES:
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                changed = True
                yield name


def _sdxl_original(flat: str, config: Mapping[str, Any]) -> str:
    """SDXL's first names (``input_blocks_4_1_...``) to diffusers'."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    state = {f"lora_unet_{flat}.lora_{part}.weight": torch.empty(1, 1, device="meta") for part in ("down", "up")}
    layers = SimpleNamespace(layers_per_block=config["layers_per_block"])
    converted, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(state, layers))
    name = next(iter(convert_unet_state_dict_to_peft(converted)))
    return re.sub(r"\.lora(_A|\.down)\.weight$", "", str(name).removeprefix("unet."))


def _wan_original(name: str) -> str:
    """Wan's first names (``blocks.0.self_attn.q``, or flat) to diffusers'."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    if "." not in name:  # a dot goes around every number, and behind the names of attention and head
        name = re.sub(r"_(?=\d)|(?<=\d)_|(?<=attn)_|(?<=^head)_", ".", name)
    # With an ending of its own, so that ".q." is found and a parameter outright stays one.
    converted = convert_wan_transformer_to_diffusers({f"{name}.x": torch.empty(0, device="meta")})
    return str(next(iter(converted))).removesuffix(".x")


_SD3_MODULES = (
    # diffusers' -> the original code's, {0} the block
    ("pos_embed.proj", "x_embedder.proj"),
    ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
    ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
    ("context_embedder", "context_embedder"),
    ("proj_out", "final_layer.linear"),
    ("norm_out.linear", "final_layer.adaLN_modulation.1"),
)
_SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
}
_SD3_FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def sd3_originals(component: str, modules: list[str]) -> Iterator[tuple[str, tuple[Place, ...]]]:
    """SD3's first names with their places. diffusers converts whole checkpoints of it, but no LoRA."""
    known = set(modules)
    numbers = [int(match[1]) for module in modules if (match := re.match(r"transformer_blocks\.(\d+)\.", module))]
    last = max(numbers, default=-1)
    for module, original in _SD3_MODULES:
        if module in known:
            yield original, (Place(component, module, halves_swapped=module == "norm_out.linear"),)
    for number in range(last + 1):
        block, first = f"transformer_blocks.{number}.", f"joint_blocks.{number}."
        for module, original in _SD3_BLOCK.items():
            if block + module in known:
                # The last block's text stream ends in a plain continuous norm, which has its halves the other way.
                swapped = module == "norm1_context.linear" and number == last
                yield first + original, (Place(component, block + module, halves_swapped=swapped),)
        for original, parts in _SD3_FUSED.items():
            if all(block + part in known for part in parts):
                places = (Place(component, block + part, third=third) for third, part in enumerate(parts))
                yield first + original, tuple(places)
