"""Adapters: which layers of a network get one, and what they have learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rmd.published.exporting import layers_of
from rmd.published.factors import Factors

_Rule = Callable[[nn.Module, list[str]], bool]
# A layer's group is the first whose rule holds, given the layer and the class names of the modules around it.
GROUPS: Mapping[str, _Rule] = {
    "convolutions": lambda layer, _around: not isinstance(layer, nn.Linear),
    "attention": lambda _layer, around: any(name.endswith("Attention") for name in around),
    "mlp": lambda _layer, around: "FeedForward" in around,
    "projections": lambda _layer, _around: True,  # of times, texts, modulations, and in and out of blocks
}


def adapted_layers(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """The layers that the setting ``lora_targets`` names: groups of :data:`GROUPS`, or the ends of modules' names.

    Raises:
        ValueError: a target that no layer has.
    """
    modules = dict(network.named_modules())
    chosen: dict[str, None] = {}
    for target in targets:
        found = [name for name in layers_of(network) if _fits(name, target, modules)]
        if not found:
            raise ValueError(
                f"lora_targets: no layer of {type(network).__name__} is {target!r}; give groups "
                f"({', '.join(GROUPS)}) or the ends of layers' names, such as to_q"
            )
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _fits(name: str, target: str, modules: Mapping[str, nn.Module]) -> bool:
    if target not in GROUPS:
        return f".{name}".endswith(f".{target}")
    parts = name.split(".")
    around = [type(modules[".".join(parts[:end])]).__name__ for end in range(1, len(parts))]
    return target == next(group for group, rule in GROUPS.items() if rule(modules[name], around))


@torch.no_grad()
def learnt_adapters(network: Any) -> dict[str, Factors]:
    """The adapters of a network under peft, by the names of their layers in the plain network; copies."""
    from peft.utils import get_peft_model_state_dict

    state = {
        name.removeprefix("base_model.model."): value for name, value in get_peft_model_state_dict(network).items()
    }
    layers = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {
        layer: Factors(*(state[f"{layer}.lora_{part}.weight"].detach().cpu().clone() for part in "AB"))
        for layer in layers
    }
