"""A published LoRA: its file or PEFT folder, read into modules with every key accounted for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmd.dtypes import dtype_name
from rmd.fields import field_of, integer, mapping, number, read_json
from rmd.published.files import SCALED, ImportRefused, WeightFiles, finite, refuse_other_formats
from rmd.weight_files import PICKLE_SUFFIXES

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_CONFIG = "lora_adapter_metadata"

_PARTS = {
    "down": r"\.lora_(?:down|A)(?:\.default)?\.weight|\.lora(?:_linear_layer)?\.down\.weight",
    "up": r"\.lora_(?:up|B)(?:\.default)?\.weight|\.lora(?:_linear_layer)?\.up\.weight",
    "alpha": r"\.alpha",
    "weight": r"\.diff",  # the whole difference of a weight that is too small for factors
    "bias": r"\.diff_b",
    "up_bias": r"\.lora_B(?:\.default)?\.bias",
    "modulation": r"\.diff_m",  # of Wan's tables, which are parameters outright
}
_KEY = re.compile(r"^(?P<module>.+?)(?:" + "|".join(f"(?P<{part}>{rule})" for part, rule in _PARTS.items()) + r")$")
# peft's initialisations that take what the adapter starts with out of the base's own weights.
_OF_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
# peft's settings under which an adapter adds something else than B A to each layer's weight.
_OTHER_SUMS = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# What looks like a LoRA and is computed otherwise.
_OTHER_KINDS = (
    (re.compile(r"dora_scale|lora_magnitude_vector"), "DoRA (its scales renormalise every column of the weight)"),
    (re.compile(r"\.hada_w|\.hada_t"), "LoHa (Hadamard products)"),
    (re.compile(r"\.lokr_"), "LoKr (Kronecker products)"),
    (re.compile(r"\.oft_|\.boft_|\.oft_blocks"), "OFT (rotations)"),
    (re.compile(r"\.lora_mid\."), "a LoRA with a third factor (Tucker)"),
    (SCALED, "an fp8 file with scales"),
)


@dataclass(frozen=True)
class Scaling:
    """How peft scales a LoRA: lora_alpha / rank, or / sqrt(rank), with exceptions by module."""

    alpha: float
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: Path) -> Scaling:
        """Read ``adapter_config.json``'s fields.

        Raises:
            ImportRefused: another method than LoRA, DoRA, adapters of a changed base, or a field that is missing or
                wrong.
        """
        if config.get("peft_type", "LORA") != "LORA":
            raise ImportRefused(f"{source}: peft_type {config['peft_type']!r} is not supported, only LORA is")
        if config.get("use_dora"):
            raise ImportRefused(f"{source}: {_OTHER_KINDS[0][1]} is not supported (use_dora)")
        start = str(config.get("init_lora_weights")).lower()
        if start.startswith(_OF_OTHER_BASES):
            raise ImportRefused(
                f"{source}: init_lora_weights {start!r} changes the base's own weights, to which this adapter belongs; "
                f"save it with peft's path_initial_model_for_weight_conversion, which makes a LoRA of the base of it"
            )
        for name in _OTHER_SUMS:
            if config.get(name):
                raise ImportRefused(f"{source}: {name} is not supported: such an adapter is no plain sum with the base")
        try:
            field_of(config, "r", integer)
            patterns = mapping(config.get("alpha_pattern") or {})
            for pattern in patterns:
                re.compile(pattern)
            return cls(
                alpha=field_of(config, "lora_alpha", number),
                alpha_pattern={name: number(value) for name, value in patterns.items()},
                rank_stabilised=bool(config.get("use_rslora", False)),
            )
        except (ValueError, re.error) as error:
            raise ImportRefused(f"{source}: {error}") from None

    def of(self, module: str, rank: int) -> float:
        """The factor of one module's ``B @ A``."""
        alpha = self.alpha
        for pattern, value in self.alpha_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", module):  # as peft matches them
                alpha = value
                break
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank


@dataclass(frozen=True)
class Lora:
    """A LoRA, opened.

    Attributes:
        path: what the user named.
        strength: the user's factor of the whole.
        files: its tensors.
        modules: published module name -> part ("down", "up", "alpha", ...) -> key.
        unread: keys that are no part of any module.
        scalings: by prefix of the module names, where the file says how it is scaled ("" is for all).
    """

    path: Path
    strength: float
    files: WeightFiles
    modules: Mapping[str, Mapping[str, str]]
    unread: tuple[str, ...]
    scalings: Mapping[str, Scaling]

    @classmethod
    def open(cls, path: Path, strength: float = 1.0) -> Lora:
        """Read the headers of a LoRA file or a PEFT folder; a PEFT folder's weight file stands for its folder.

        Raises:
            ImportRefused: not safetensors, DoRA and other kinds, fp8 with scales, a folder without its settings, or
                weights that are no floating-point numbers.
            FileNotFoundError: there is no such file.
        """
        if path.is_dir():
            files, scalings = _open_peft(path)
        elif path.name == PEFT_WEIGHTS and (path.parent / PEFT_CONFIG).is_file():
            files, scalings = _open_peft(path.parent)
        else:
            files = WeightFiles.open(path)
            scalings = _diffusers_scalings(files)
        for key in files:
            for rule, kind in _OTHER_KINDS:
                if rule.search(key):
                    raise ImportRefused(f"{path} is {kind}, which is not supported: it holds {key!r}")
        modules: dict[str, dict[str, str]] = {}
        unread: list[str] = []
        for key in files:
            match = _KEY.match(_today(key))
            if match is None:
                unread.append(key)
                continue
            part = next(part for part in _PARTS if match[part] is not None)
            parts = modules.setdefault(match["module"], {})
            if part in parts:
                raise ImportRefused(f"{path}: {parts[part]!r} and {key!r} name the same weights")
            parts[part] = key
            if not files.entries[key].dtype.is_floating_point:
                raise ImportRefused(
                    f"{path}: {key!r} is of {dtype_name(files.entries[key].dtype)}, which is no weight's dtype: it is "
                    f"quantised, which is not supported; give a bfloat16 or float16 release"
                )
        return cls(path, strength, files, modules, tuple(unread), scalings)

    def scale(self, module: str) -> float:
        """The factor of a module's ``B @ A``: strength * alpha / rank, from whichever place says it; else strength.

        Raises:
            ImportRefused: it has no rank, or its alpha is no finite number.
        """
        parts = self.modules[module]
        shape = self.files.entries[parts["down"]].shape
        rank = shape[0] if shape else 0
        if not rank:
            raise ImportRefused(f"{self.path}: {parts['down']!r} has the shape {list(shape)}, which is of no rank")
        if "alpha" in parts:
            values = self.files[parts["alpha"]].flatten().tolist()
            if len(values) != 1 or not math.isfinite(values[0]):
                raise ImportRefused(f"{self.path}: {parts['alpha']!r} is no finite number")
            return self.strength * float(values[0]) / rank
        for prefix, scaling in self.scalings.items():
            if module.startswith(prefix):
                return self.strength * scaling.of(module.removeprefix(prefix), rank)
        return self.strength

    def tensor(self, key: str) -> Tensor:
        """One tensor in float32, checked to be finite."""
        return finite(self.files[key], key, self.files.entries[key].file).to(torch.float32)


def _today(key: str) -> str:
    """diffusers' oldest names (attention processors with layers of their own) in its present ones."""
    if not re.search(r"_lora\.(down|up)\.weight$", key):
        return key
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    one = {key: None}
    if key.startswith("text_encoder"):
        return str(next(iter(convert_state_dict_to_peft(one, StateDictType.DIFFUSERS_OLD))))
    return str(next(iter(convert_unet_state_dict_to_peft(one))))


def _open_peft(folder: Path) -> tuple[WeightFiles, dict[str, Scaling]]:
    settings = folder / PEFT_CONFIG
    if not settings.is_file():
        raise ImportRefused(
            f"{folder} has no {PEFT_CONFIG}, so it is no PEFT folder; give one, or the LoRA's .safetensors file"
        )
    weights = folder / PEFT_WEIGHTS
    if not weights.is_file():
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in PICKLE_SUFFIXES:
                refuse_other_formats(file)
        raise ImportRefused(f"{folder} has no {PEFT_WEIGHTS}; copy it again")
    try:
        config = mapping(read_json(settings))
    except ValueError as error:
        raise ImportRefused(f"{settings}: {error}") from None
    # Every module is scaled so, whether its name has peft's prefix or was saved without it.
    scaling = Scaling.from_config(config, settings)
    return WeightFiles.open(weights), {"base_model.model.": scaling, "": scaling}


def _diffusers_scalings(files: WeightFiles) -> dict[str, Scaling]:
    """What diffusers' ``save_lora_weights`` writes into the header: peft's settings, prefixed by component."""
    if DIFFUSERS_CONFIG not in files.metadata:
        return {}
    try:
        stored = mapping(json.loads(files.metadata[DIFFUSERS_CONFIG]))
    except ValueError:
        raise ImportRefused(f"{files.path}: the header's {DIFFUSERS_CONFIG} is no JSON object") from None
    by_prefix: dict[str, dict[str, Any]] = {}
    for key, value in stored.items():
        prefix, _, name = key.rpartition(".")
        by_prefix.setdefault(f"{prefix}." if prefix else "", {})[name] = value
    return {prefix: Scaling.from_config(config, files.path) for prefix, config in by_prefix.items()}
