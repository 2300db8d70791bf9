"""AdamW over float32 master weights of networks that may run in bfloat16, and the averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from training.distill.momentum_free import MomentumFreeAdamW
from training.runtime.sharding import like_shard, local, whole


class MasterAdamW:
    """AdamW on float32 copies of the trained parameters.

    A bfloat16 weight near 1 cannot take a step of 1e-4, so the working weights are rounded from masters after each
    update. Parameters that are float32 already, such as the shards of a sharded network, are their own masters.

    Gradients of several backward passes add up in float32; a working weight's own is dropped as soon as it is made.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rate: float,
        betas: tuple[float, float] = (0.0, 0.95),
        weight_decay: float = 0.0,
        clip_norm: float = 1.0,
        second_moment: Literal["float32", "8bit"] = "float32",
    ) -> None:
        if not parameters:
            raise ValueError("nothing to train: no parameter requires a gradient")
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.masters: list[Tensor] = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.parameters
        ]
        self.separate = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        for parameter, master in self.separate:
            parameter.register_post_accumulate_grad_hook(partial(_collect, master))  # type: ignore[no-untyped-call]
        self.clip_norm = clip_norm
        first, second = float(betas[0]), float(betas[1])
        self.adamw: torch.optim.Optimizer
        if first == 0.0:
            self.adamw = MomentumFreeAdamW(self.masters, rate, second, weight_decay, second_moment)
        else:
            self.adamw = torch.optim.AdamW(
                self.masters, lr=rate, betas=(first, second), weight_decay=weight_decay, fused=True
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
            if parameter.grad is not None:
                _collect(master, parameter)
        grads = [master.grad for master in self.masters if master.grad is not None]
        if reduce is not None:
            reduce(grads)
        norm = whole(torch.nn.utils.get_total_norm(grads))
        value = float(norm)
        if torch.isfinite(norm):
            if value > self.clip_norm:
                torch._foreach_mul_([local(grad) for grad in grads], self.clip_norm / (value + 1e-6))
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
        """AdamW's moments and counters as flat `<parameter>.<field>` tensors; moments sharded as the weights are."""
        if isinstance(self.adamw, MomentumFreeAdamW):
            return self.adamw.named_state(self.names)
        state = {}
        for name, master in zip(self.names, self.masters, strict=True):
            for field, value in self.adamw.state.get(master, {}).items():
                state[f"{name}.{field}"] = value
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`optimizer_state` gave."""
        if isinstance(self.adamw, MomentumFreeAdamW):
            self.adamw.load_named_state(self.names, state)
            return
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


@torch.no_grad()
def _collect(master: Tensor, parameter: Tensor) -> None:
    """Add a working weight's gradient to its master's."""
    grad, parameter.grad = parameter.grad, None
    if grad is None:
        return
    if master.grad is None:
        master.grad = grad.float()
    else:
        master.grad += grad


class AveragedWeights:
    """Exponential moving average of master weights, float32; of sharded ones each process averages its part.

    The decay rises as `(1 + n) / (10 + n)` at first, so that the average forgets the initial weights.

    Args:
        device: where the average lies; the weights' own by default.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float, device: torch.device | str | None = None) -> None:
        self.decay = decay
        self.weights = {
            name: torch.empty_like(local(value), dtype=torch.float32, device=device).copy_(local(value).detach())
            for name, value in weights.items()
        }
        self.updates = 0

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Move the average towards `weights`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for (
            name,
            average,
        ) in self.weights.items():  # one at a time: elsewhere than the weights, they would all be copied
            average.lerp_(local(weights[name]).to(average.device), 1 - decay)

    def state(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The average, sharded as `weights` are."""
        return {name: like_shard(value, weights[name]) for name, value in self.weights.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Restore what :meth:`state` gave after so many updates."""
        for name, average in self.weights.items():
            average.copy_(local(state[name]))
        self.updates = updates
