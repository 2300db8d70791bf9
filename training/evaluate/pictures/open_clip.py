"""Weights of a CLIP network under open_clip's names, under the names that transformers gives the same network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

_MARK = "visual.conv1.weight"
_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def is_open_clip(names: Iterable[str]) -> bool:
    """Whether tensors of these names are open_clip's."""
    return any(name.endswith(_MARK) for name in names)


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights for ``transformers.CLIPModel``.

    Args:
        tensors: open_clip's, all under one prefix or none (``model.`` where a wrapper saved them).

    Raises:
        ValueError: a name that is none of open_clip's.
    """
    prefix = next(name for name in tensors if name.endswith(_MARK)).removesuffix(_MARK)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = name.removeprefix(prefix)
        stem, _, kind = own.rpartition(".")
        block = _BLOCK.fullmatch(own)
        if own in _PROJECTIONS:  # open_clip multiplies from the right
            found[_PROJECTIONS[own]] = tensor.T.contiguous()
        elif own in _NAMES:
            found[_NAMES[own]] = tensor
        elif stem in _NAMES:
            found[f"{_NAMES[stem]}.{kind}"] = tensor
        elif block is not None:
            tower = "vision_model" if block[1] else "text_model"
            found.update(_in_block(f"{tower}.encoder.layers.{block[2]}", block[3], tensor))
        else:
            raise ValueError(f"{name!r} is no weight of a CLIP network in open_clip's names")
    return found


def _in_block(layer: str, own: str, tensor: Tensor) -> dict[str, Tensor]:
    if own in ("attn.in_proj_weight", "attn.in_proj_bias"):  # query, key and value in one
        kind = own.removeprefix("attn.in_proj_")
        parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
        return {f"{layer}.self_attn.{name}.{kind}": part.contiguous() for name, part in parts}
    stem, _, kind = own.rpartition(".")
    if stem not in _IN_BLOCK:
        raise ValueError(f"{own!r} is no weight of a CLIP layer in open_clip's names")
    return {f"{layer}.{_IN_BLOCK[stem]}.{kind}": tensor}
