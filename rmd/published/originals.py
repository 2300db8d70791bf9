"""Networks under the names of the code that they were first published with, converted by diffusers, every key counted.

diffusers' converters pick what they know and leave the rest. So each is run twice: on tensors without values that
remember what they were made from, which tells the keys that went nowhere, and then on the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmd.backbones.random_weights import resolve

Converter = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""Original names to diffusers' names; may empty the dictionary that it is given."""

DENOISER_PREFIX = "model.diffusion_model."
_TEXT_PREFIXES = {
    "conditioner.embedders.0.": "conditioner.embedders.0.transformer.",
    "text_encoders.clip_l.": "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.": "text_encoders.clip_g.transformer.",
}
_OPEN_CLIP = "conditioner.embedders.1."
_OPEN_CLIP_MODEL = "conditioner.embedders.1.model."
_T5 = "text_encoders.t5xxl."
_VAE = "first_stage_model."

PARTS: Mapping[str, Mapping[str, str]] = {
    "sdxl": {
        DENOISER_PREFIX: "unet",
        _VAE: "vae",
        "conditioner.embedders.0.": "text_encoder",
        _OPEN_CLIP: "text_encoder_2",
    },
    "sd3": {
        DENOISER_PREFIX: "transformer",
        _VAE: "vae",
        "text_encoders.clip_l.": "text_encoder",
        "text_encoders.clip_g.": "text_encoder_2",
        _T5: "text_encoder_3",
    },
    "wan": {DENOISER_PREFIX: "transformer"},
}
"""Family -> prefix of the keys in an all-in-one file -> the component that they belong to."""


class _Traced(Tensor):
    """A tensor without values that remembers the keys that it was made from."""

    sources: frozenset[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made_from = frozenset[str]().union(*(tensor.sources for tensor in _traced_in((args, kwargs or {}))))
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        for tensor in _tensors_in(result):
            tensor.sources = made_from
        return result


def _tensors_in(value: Any) -> list[_Traced]:
    if isinstance(value, _Traced):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inner for tensor in _tensors_in(item)]


def _traced_in(value: Any) -> list[_Traced]:
    return [tensor for tensor in _tensors_in(value) if hasattr(tensor, "sources")]


@dataclass(frozen=True)
class Traced:
    """What a conversion would make.

    Attributes:
        shapes: by the new names.
        sources: new name -> the keys that it is made from.
        dropped: keys that nothing is made from.
    """

    shapes: Mapping[str, tuple[int, ...]]
    sources: Mapping[str, frozenset[str]]
    dropped: tuple[str, ...]


def trace(convert: Converter, shapes: Mapping[str, tuple[int, ...]]) -> Traced | None:
    """Run a conversion on tensors without values; None where the converter takes the keys for none of its own."""
    given: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, device="meta").as_subclass(_Traced)
        tensor.sources = frozenset((name,))
        given[name] = tensor
    try:
        made = dict(convert(given))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError, RuntimeError):
        return None
    sources = {name: getattr(tensor, "sources", frozenset[str]()) for name, tensor in made.items()}
    used = frozenset[str]().union(*sources.values())
    return Traced(
        shapes={name: tuple(tensor.shape) for name, tensor in made.items()},
        sources=sources,
        dropped=tuple(name for name in shapes if name not in used),
    )


def converter_of(target: str, config: Mapping[str, Any], prefix: str) -> Converter | None:
    """diffusers' conversion of one component of an all-in-one file, or of a network's own file.

    Args:
        target: the component's class as ``module:Class``.
        config: its configuration.
        prefix: of its keys; see :data:`PARTS`.

    Returns:
        The conversion, or None where diffusers has none for that class.
    """
    if prefix in _TEXT_PREFIXES:
        return lambda given: _clip(given, target, config, _TEXT_PREFIXES[prefix])
    if prefix == _OPEN_CLIP:
        return lambda given: _open_clip(given, target, config)
    if prefix == _T5:
        from diffusers.loaders.single_file_utils import convert_sd3_t5_checkpoint_to_diffusers

        return lambda given: dict(convert_sd3_t5_checkpoint_to_diffusers(given))
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    entry = SINGLE_FILE_LOADABLE_CLASSES.get(target.split(":")[1])
    if entry is None:
        return None
    convert = entry["checkpoint_mapping_fn"]
    return lambda given: dict(convert(checkpoint=given, config=dict(config)))


def _clip(given: dict[str, Tensor], target: str, config: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

    made = dict(convert_ldm_clip_checkpoint(given, prefix))
    projected = target.endswith("WithProjection")
    if projected and prefix == _TEXT_PREFIXES["text_encoders.clip_l."] and "text_projection.weight" not in made:
        made["text_projection.weight"] = torch.eye(int(config["hidden_size"]))  # as diffusers' reader: L has none
    return _own_names(made, target)


def _open_clip(given: dict[str, Tensor], target: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    from types import SimpleNamespace

    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    model = SimpleNamespace(config=SimpleNamespace(hidden_size=int(config["hidden_size"])))
    return _own_names(dict(convert_open_clip_checkpoint(model, given, prefix=_OPEN_CLIP_MODEL)), target)


def _own_names(made: Mapping[str, Tensor], target: str) -> dict[str, Tensor]:
    """The names as this version of transformers has them: the plain text model has lost its wrapper."""
    wrapped = "text_model" in _module_names(target)
    return dict(made) if wrapped else {name.removeprefix("text_model."): tensor for name, tensor in made.items()}


def _module_names(target: str) -> Iterable[str]:
    cls = resolve(target)
    small = cls.config_class(
        hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=8
    )
    with torch.device("meta"):
        return [name for name, _ in cls(small).named_children()]
