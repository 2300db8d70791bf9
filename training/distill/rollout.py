"""Roll-outs of the student's cascade up to the steps that an update differentiates.

Two ways. *Fresh* (Algorithm 1): a random step, and every sample of the batch is rolled out to it without gradient.
*Pipelined* (ours): every batch holds samples at every active step; what a sample's step predicted, with gradient, also
moves it on, so that it stands at the next step in the next update. The roll-out then costs nothing, each update sees
all steps, and a sample's state is as old as the few updates that it has lived through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rmd.cascade import Cascade
from rmd.noise_schedule import NoiseSchedule
from rmd.sampler import advance, needs_noise
from rmd.size import Size
from training.runtime.randomness import Randomness


class X0Backbone(Protocol):
    """What training asks of a backbone; :class:`rmd.backbones.base.Backbone` has it all."""

    schedule: NoiseSchedule
    device: torch.device

    @property
    def takes_frame_numbers(self) -> bool: ...

    def latent_shape(self, size: Size) -> tuple[int, ...]: ...

    def predict_x0(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: dict[str, Tensor],
        size: Size,
        denoiser: nn.Module | None = None,
    ) -> Tensor: ...

    def guided_x0(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: dict[str, Tensor],
        uncond: dict[str, Tensor] | None,
        scale: float,
        size: Size,
        denoiser: nn.Module | None = None,
    ) -> Tensor: ...


class Prompts(Protocol):
    """Encoded prompts, by row."""

    def draw(self, random: Randomness, count: int) -> Tensor:
        """`count` row numbers, int64."""
        ...

    def conditioning(self, rows: Tensor) -> dict[str, Tensor]:
        """The conditions of these rows."""
        ...

    def unconditional(self, count: int) -> dict[str, Tensor]:
        """The conditions that guidance contrasts with, `count` times."""
        ...


@dataclass(frozen=True)
class State:
    """Samples that stand before one step.

    Attributes:
        step: index of the step in the cascade.
        x_t: (B, C, [T], H, W) at the step's side and time.
        rows: (B,) rows of the prompts.
    """

    step: int
    x_t: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Prediction:
    """The student's predictions at one size, with gradient; possibly of several steps.

    Attributes:
        size: of the picture at these steps.
        x_t, x0: (B, C, [T], H, W).
        t: (B,) the students' own (mapped) times.
        steps: (B,) step indices, int64 on the CPU.
        rows: (B,) rows of the prompts.
    """

    size: Size
    x_t: Tensor
    x0: Tensor
    t: Tensor
    steps: Tensor
    rows: Tensor


class Rollout:
    """Produces the states that an update starts from."""

    def __init__(
        self,
        backbone: X0Backbone,
        cascade: Cascade,
        prompts: Prompts,
        random: Randomness,
        batch_size: int,
        pipelined: bool = False,
    ) -> None:
        self.backbone, self.cascade, self.prompts, self.random = backbone, cascade, prompts, random
        self.batch_size, self.pipelined = batch_size, pipelined
        self.carried: dict[int, State] = {}

    def states(self, student: nn.Module, active: Sequence[int]) -> list[State]:
        """States at the active steps: one step's (fresh), or every step's (pipelined).

        Args:
            student: called without gradient for the steps before.
            active: indices of the steps that may be trained, ascending.
        """
        if not self.pipelined:
            step = active[int(self.random.shared() * len(active))]
            return [self.roll_out(student, step, self.batch_size)]
        states = []
        for index, step in enumerate(active):
            count = self.batch_size // len(active) + (index < self.batch_size % len(active))
            if count == 0:
                continue
            state = self.carried.pop(step, None)
            if state is None or len(state.rows) != count:
                state = self.roll_out(student, step, count)
            states.append(state)
        self.carried.clear()
        return states

    @torch.no_grad()
    def roll_out(self, student: nn.Module, step: int, count: int) -> State:
        """`count` new samples, from noise to just before `step`."""
        first = self.cascade.steps[0]
        rows = self.prompts.draw(self.random, count)
        conditioning = self.prompts.conditioning(rows)
        noise = self.random.normal((count, *self.backbone.latent_shape(first.size)))
        state = State(0, noise * self.cascade.initial_noise_scale, rows)
        for index in range(step):
            x0 = self._x0(student, state.x_t, index, conditioning)
            state = self._next(state, x0)
        return state

    def predict(self, student: nn.Module, states: Sequence[State]) -> list[Prediction]:
        """Run the student at the states, with gradient: one call a size.

        Pipelined samples are carried on to their next step.
        """
        predictions = []
        steps = self.cascade.steps
        for size in dict.fromkeys(steps[state.step].size for state in states):
            group = [state for state in states if steps[state.step].size == size]
            x_t = torch.cat([state.x_t for state in group])
            rows = torch.cat([state.rows for state in group])
            indices = torch.cat([torch.full((len(state.rows),), state.step) for state in group])
            t = torch.tensor([steps[int(i)].t for i in indices], dtype=torch.float64, device=x_t.device)
            x0 = self.backbone.predict_x0(x_t, t, self.prompts.conditioning(rows), size, denoiser=student)
            predictions.append(Prediction(size, x_t, x0, t, indices, rows))
            if self.pipelined:
                for state, part in zip(group, torch.split(x0.detach(), [len(s.rows) for s in group]), strict=True):
                    if state.step + 1 < self.cascade.num_steps:
                        following = self._next(state, part)
                        self.carried[following.step] = following
        return predictions

    def _x0(self, student: nn.Module, x_t: Tensor, index: int, conditioning: dict[str, Tensor]) -> Tensor:
        step = self.cascade.steps[index]
        t = torch.full((x_t.shape[0],), step.t, dtype=torch.float64, device=x_t.device)
        return self.backbone.predict_x0(x_t, t, conditioning, step.size, denoiser=student)

    @torch.no_grad()
    def _next(self, state: State, x0: Tensor) -> State:
        index = state.step
        noise = None
        if needs_noise(self.cascade, index, training=True):
            size = self.cascade.steps[index + 1].size
            noise = self.random.normal((len(state.rows), *self.backbone.latent_shape(size)))
        x_next = advance(
            self.cascade, index, state.x_t, x0, self.backbone.schedule, self.backbone.latent_shape, noise, training=True
        )
        return State(index + 1, x_next, state.rows)

    def state_dict(self) -> dict[str, Tensor]:
        """The carried states, for a checkpoint."""
        tensors = {}
        for step, state in self.carried.items():
            tensors[f"carried.{step}.x_t"] = state.x_t
            tensors[f"carried.{step}.rows"] = state.rows
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.carried = {}
        for key, x_t in tensors.items():
            if key.startswith("carried.") and key.endswith(".x_t"):
                step = int(key.split(".")[1])
                self.carried[step] = State(step, x_t.to(self.backbone.device), tensors[f"carried.{step}.rows"])
