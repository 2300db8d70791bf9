"""Networks rewritten into fewer, larger matrix products, computing the same, whose weights the kernels can pack.

Parameters are joined, never changed, and :class:`Rewritten` tells from which the joined ones come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from engines.compilers.inductor.attention import Attention, fused_attention
from engines.compilers.inductor.joined_bert import JoinedBert, is_plain_bert
from engines.compilers.inductor.joined_sd3 import JoinedSD3, is_plain_sd3
from engines.weights.recipes import Recipe

_SD3, _BERT = "joined-sd3-6", "joined-bert-1"


@dataclass(frozen=True)
class Rewritten:
    """A module to compile in place of the original.

    Attributes:
        module: takes and returns what the original does.
        sources: how each parameter and buffer of ``module`` comes from the original's; a recipe without sources stands
            for a constant that no weights can change.
        name: of the rewriting, part of the engine's key; "" when the module is the original.
    """

    module: nn.Module
    sources: dict[str, Recipe] = field(default_factory=dict)
    name: str = ""


def rewrite(module: nn.Module, inputs: Mapping[str, Tensor], attend: Attention = fused_attention) -> Rewritten:
    """The fastest known form of ``module`` for the CPU at the inputs' shapes; the module itself when none applies.

    Args:
        attend: how a denoiser's attention is computed.
    """
    name = rewriting(module)
    if name == _SD3:
        sd3 = JoinedSD3(module.transformer, "transformer.", inputs["latents"], attend)
        return Rewritten(sd3, sd3.sources, name)
    if name == _BERT:
        bert = JoinedBert(module.model, "model.", inputs["input_ids"].shape[1])
        return Rewritten(bert, bert.sources, name)
    return Rewritten(module)


def rewriting(module: nn.Module) -> str:
    """The name that :func:`rewrite` would give, without doing it (works on the meta device)."""
    if is_plain_sd3(getattr(module, "transformer", None)):
        return _SD3
    return _BERT if is_plain_bert(getattr(module, "model", None)) else ""
