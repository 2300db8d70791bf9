"""AdamW without the first moment, which beta1 = 0 never uses: 4 bytes a parameter for 8, or 1 in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from training.runtime.sharding import like_shard, local

_BLOCK = 256  # values that share a scale, as torchao's 8-bit optimisers have it
_LEAST = 4096  # smaller weights keep float32, likewise
_EPS = 1e-8  # torch.optim.AdamW's


class MomentumFreeAdamW(torch.optim.Optimizer):
    """`v <- b v + (1 - b) g^2`, `w <- (1 - r d) w - r g / (sqrt(v / (1 - b^t)) + eps)` (arXiv 1711.05101, beta1 = 0).

    Args:
        weights: float32; of sharded ones each process updates its part.
        rate, beta, weight_decay: r, b and d.
        second_moment: how `v` is held; "8bit" needs torchao.

    Raises:
        ValueError: "8bit" without torchao.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        rate: float,
        beta: float,
        weight_decay: float,
        second_moment: Literal["float32", "8bit"] = "float32",
    ) -> None:
        super().__init__(weights, {"lr": rate, "beta": beta, "weight_decay": weight_decay})
        self.quantised = _quantised_class() if second_moment == "8bit" else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient; one after the other, so that temporaries stay small."""
        for group in self.param_groups:
            rate, beta, decay = group["lr"], group["beta"], group["weight_decay"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update(step=torch.zeros(()), exp_avg_sq=self._zeros(local(weight)))
                state["step"] += 1
                value, grad = local(weight), local(weight.grad)
                stored = state["exp_avg_sq"]
                moment = stored.dequantize() if self._is_quantised(stored) else stored
                moment.mul_(beta).addcmul_(grad, grad, value=1 - beta)
                if moment is not stored:
                    stored.copy_(moment)
                corrected = moment.sqrt().div_(math.sqrt(1 - beta ** int(state["step"]))).add_(_EPS)
                value.mul_(1 - rate * decay).addcdiv_(grad, corrected, value=-rate)

    def _zeros(self, weight: Tensor) -> Tensor:
        if self.quantised is None or weight.numel() < _LEAST or weight.numel() % _BLOCK:
            return torch.zeros_like(weight, requires_grad=False)
        zeros: Tensor = self.quantised.zeros(weight.shape, signed=False, block_size=_BLOCK, device=weight.device)
        return zeros

    def _is_quantised(self, moment: Tensor) -> bool:
        return self.quantised is not None and isinstance(moment, self.quantised)

    def named_state(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Flat `<name>.step` and `<name>.exp_avg_sq`, or its `codes` and `scale` in 8 bits, for a checkpoint."""
        flat: dict[str, Tensor] = {}
        for name, weight in zip(names, self.param_groups[0]["params"], strict=True):
            state = self.state.get(weight)
            if not state:
                continue
            flat[f"{name}.step"] = state["step"]
            moment = state["exp_avg_sq"]
            if self._is_quantised(moment):
                flat |= {f"{name}.exp_avg_sq.codes": moment.codes, f"{name}.exp_avg_sq.scale": moment.scale}
            else:
                flat[f"{name}.exp_avg_sq"] = like_shard(moment, weight)
        return flat

    def load_named_state(self, names: Sequence[str], flat: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`named_state` gave."""
        for name, weight in zip(names, self.param_groups[0]["params"], strict=True):
            if f"{name}.step" not in flat:
                continue
            moment = self._zeros(local(weight))
            if self._is_quantised(moment):
                moment.codes.copy_(flat[f"{name}.exp_avg_sq.codes"])  # type: ignore[attr-defined]
                moment.scale.copy_(flat[f"{name}.exp_avg_sq.scale"])  # type: ignore[attr-defined]
            else:
                moment.copy_(local(flat[f"{name}.exp_avg_sq"]))
            self.state[weight] = {"step": flat[f"{name}.step"].cpu().clone(), "exp_avg_sq": moment}


def _quantised_class() -> Any:
    """torchao's tensor of 8-bit blocks.

    Raises:
        ValueError: torchao is not installed.
    """
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError:
        raise ValueError(
            "second_moment=8bit needs torchao (pip install 'rmd[train-8bit]'); leave it out for float32"
        ) from None
    return OptimState8bit
