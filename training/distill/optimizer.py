"""AdamW over float32 master weights of networks that may run in bfloat16, and the averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class MasterAdamW:
    """AdamW on float32 copies of the trained parameters.

    A bfloat16 weight near 1 cannot take a step of 1e-4, so the working weights are rounded from masters after each
    update. Parameters that are float32 already are their own masters.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rate: float,
        betas: tuple[float, float] = (0.0, 0.95),
        weight_decay: float = 0.0,
        clip_norm: float = 1.0,
    ) -> None:
        if not parameters:
            raise ValueError("nothing to train: no parameter requires a gradient")
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.masters: list[Tensor] = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.parameters
        ]
        self.separate = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        self.clip_norm = clip_norm
        self.adamw = torch.optim.AdamW(
            self.masters, lr=rate, betas=(float(betas[0]), float(betas[1])), weight_decay=weight_decay, fused=True
        )

    def zero_grad(self) -> None:
        """Drop the gradients of working weights and masters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.grad = None
            master.grad = None

    def step(self, rate: float, reduce: Callable[[list[Tensor]], None] | None = None) -> float:
        """Clip the gradients to `clip_norm`, update, and return their norm before clipping.

        A norm that is not finite skips the update.

        Args:
            rate: learning rate of this update.
            reduce: averages gradients over processes, in place.
        """
        for parameter, master in self.separate:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None  # at once: both together are half as much again
        grads = [master.grad for master in self.masters if master.grad is not None]
        if reduce is not None:
            reduce(grads)
        norm = torch.nn.utils.get_total_norm(grads)
        value = float(norm)
        if torch.isfinite(norm):
            if value > self.clip_norm:
                torch._foreach_mul_(grads, self.clip_norm / (value + 1e-6))
            for group in self.adamw.param_groups:
                group["lr"] = rate
            self.adamw.step()
            self._publish()
        self.zero_grad()
        return value

    @torch.no_grad()
    def _publish(self) -> None:
        """Round the masters into the working weights."""
        if self.separate:
            working, masters = zip(*self.separate, strict=True)
            torch._foreach_copy_(list(working), list(masters))

    def master_state(self) -> dict[str, Tensor]:
        """The float32 weights by parameter name."""
        return {name: master.detach() for name, master in zip(self.names, self.masters, strict=True)}

    @torch.no_grad()
    def load_master_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore weights and working copies.

        Raises:
            ValueError: the names or shapes differ.
        """
        if set(state) != set(self.names):
            odd = sorted(set(state) ^ set(self.names))
            raise ValueError(f"the saved weights do not fit this network: {len(odd)} names differ, such as {odd[0]!r}")
        for name, master in zip(self.names, self.masters, strict=True):
            if state[name].shape != master.shape:
                raise ValueError(
                    f"saved weight {name!r} has shape {tuple(state[name].shape)}, not {tuple(master.shape)}"
                )
            master.copy_(state[name])
        self._publish()

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments and counters as flat `<parameter>.<field>` tensors."""
        state = {}
        for name, master in zip(self.names, self.masters, strict=True):
            for field, value in self.adamw.state.get(master, {}).items():
                state[f"{name}.{field}"] = value
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`optimizer_state` gave."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, field = key.rpartition(".")
            by_name.setdefault(name, {})[field] = value
        for name, master in zip(self.names, self.masters, strict=True):
            if name in by_name:
                # The counters too: fused AdamW wants them on the weights' device. Moments in the weights' own strides
                # (channels last, say): it walks the memory of all three side by side.
                self.adamw.state[master] = {
                    field: torch.empty_like(master if value.shape == master.shape else value.to(master)).copy_(value)
                    for field, value in by_name[name].items()
                }


class AveragedWeights:
    """Exponential moving average of master weights, float32.

    The decay rises as `(1 + n) / (10 + n)` at first, so that the average forgets the initial weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().float().clone() for name, value in weights.items()}
        self.updates = 0

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Move the average towards `weights`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.weights.values()), [weights[name] for name in self.weights], 1 - decay)
