"""``MiniLMEncoder`` in fewer matrix products, whose weights can be packed, computing the same.

As it is, its lookups at constant positions would be folded with what is added to them, and no such sum could be traced
to a parameter. Here the rows of the positions are constants, added to the words one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.compilers.inductor.joined import Joined
from engines.weights.recipes import Recipe


def is_plain_bert(model: Any) -> bool:
    """An encoder with GELU's exact form, as MiniLM is."""
    return type(model).__name__ == "BertModel" and model.config.hidden_act == "gelu" and not model.config.is_decoder


class JoinedBert(Joined):
    """``MiniLMEncoder`` with joined matrices; same arguments, same result up to rounding.

    Args:
        model: a ``BertModel``.
        prefix: of its parameters' names in the component.
        length: tokens of a prompt.
    """

    kind: Tensor
    positions: Tensor

    def __init__(self, model: Any, prefix: str, length: int) -> None:
        super().__init__(model, prefix)
        self.heads = int(model.config.num_attention_heads)
        table = model.embeddings
        self.words = table.word_embeddings
        self.sources["words.weight"] = Recipe((f"{self._names[id(table.word_embeddings)]}.weight",))
        self.rows_of("kind", table.token_type_embeddings, 1)
        self.rows_of("positions", table.position_embeddings, length)
        self.norm = self.norm_of("norm", table.LayerNorm)
        self.layers = nn.ModuleList(
            self._join_layer(f"layers.{index}.", layer) for index, layer in enumerate(model.encoder.layer)
        )

    def _join_layer(self, path: str, layer: Any) -> nn.ModuleDict:
        attention = layer.attention
        parts = {
            "qkv": [attention.self.query, attention.self.key, attention.self.value],
            "out": [attention.output.dense],
            "up": [layer.intermediate.dense],
            "down": [layer.output.dense],
        }
        joined: dict[str, nn.Module] = {name: self.join(path + name, linears) for name, linears in parts.items()}
        joined["norm"] = self.norm_of(f"{path}norm", attention.output.LayerNorm)
        joined["last_norm"] = self.norm_of(f"{path}last_norm", layer.output.LayerNorm)
        return nn.ModuleDict(joined)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L, D); arguments as ``MiniLMEncoder``."""
        batch, length = input_ids.shape
        seen = attention_mask[:, None, None, :].bool().expand(batch, 1, length, length)
        x: Tensor = self.norm(self.words(input_ids) + self.kind + self.positions)
        for layer in self.layers:
            joint = layer["qkv"](x).view(batch, length, 3, self.heads, -1)  # type: ignore[index]
            query, key, value = joint.permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
            x = layer["norm"](layer["out"](mixed.transpose(1, 2).reshape(batch, length, -1)) + x)  # type: ignore[index]
            x = layer["last_norm"](layer["down"](gelu(layer["up"](x))) + x)  # type: ignore[index]
        return x * attention_mask[..., None].to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """In float32 and rounded once, as eager's single operation is: engines round bfloat16 after every one of theirs."""
    return F.gelu(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
