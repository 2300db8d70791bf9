"""What the rewritten networks have in common: parameters joined, never changed, and told from which they come."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engines.weights.recipes import Recipe


class Joined(nn.Module):
    """A network whose linear layers are joined from another's.

    Args:
        original: whose parameters are joined.
        prefix: of their names in the component.

    Attributes:
        sources: how each parameter and buffer comes from the original's.
    """

    def __init__(self, original: nn.Module, prefix: str) -> None:
        super().__init__()
        self.sources: dict[str, Recipe] = {}
        self._names = {id(child): f"{prefix}{name}" for name, child in original.named_modules()}

    def join(self, path: str, linears: list[Any]) -> nn.Linear:
        """One linear layer with the outputs of ``linears`` side by side, to stand at ``path``."""
        for parameter in ("weight", "bias"):
            names = tuple(f"{self._names[id(linear)]}.{parameter}" for linear in linears)
            kernel = getattr(linears[0], parameter).dim() > 2
            self.sources[f"{path}.{parameter}"] = Recipe(names, layout="matrix" if kernel else "plain")
        weight = torch.cat([linear.weight.detach().flatten(1) for linear in linears])
        with torch.device("meta"):
            joined = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        joined.weight = nn.Parameter(weight, requires_grad=False)
        joined.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]), requires_grad=False)
        return joined

    def rows_of(self, name: str, table: nn.Embedding, rows: int) -> None:
        """Register the first ``rows`` rows of a table as the buffer ``name``."""
        self.sources[name] = Recipe((f"{self._names[id(table)]}.weight",), rows=rows)
        self.register_buffer(name, table.weight.detach()[:rows].clone())

    def norm_of(self, path: str, norm: nn.LayerNorm) -> nn.LayerNorm:
        """A layer norm as it is, to stand at ``path``."""
        for parameter in ("weight", "bias"):
            self.sources[f"{path}.{parameter}"] = Recipe((f"{self._names[id(norm)]}.{parameter}",))
        return norm
