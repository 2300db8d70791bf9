"""Roll-outs of the student's cascade up to the steps that an update differentiates.

Which step a sample is trained at is drawn by stage (Eq. 6: first a stage, then one of its steps) or evenly by step.
There are four ways to fill a batch, all but the last by roll-outs without gradient (Algorithm 1):

- *fresh*: one step, for every sample of the batch.
- *stage*: one stage; each sample its own step of it.
- *mixed*: each sample its own step, spread over the batch as evenly as the law allows.
- *pipelined* (ours): every batch holds samples at every active step; what a sample's step predicted, with gradient,
  also moves it on, so that it stands at the next step in the next update. The roll-out then costs nothing, each update
  sees all steps, and a sample's state is as old as the few updates that it has lived through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from rmd.cascade import Cascade
from rmd.noise_schedule import NoiseSchedule
from rmd.sampler import advance, needs_noise
from rmd.size import Size
from training.runtime.randomness import Randomness

Mode = Literal["fresh", "stage", "mixed", "pipelined"]
Draw = Literal["stage", "step"]


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
        clean: the clean latents that the samples were made of, where a method starts from such.
    """

    step: int
    x_t: Tensor
    rows: Tensor
    clean: Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """The student's predictions at one size, with gradient; possibly of several steps.

    Attributes:
        size: of the picture at these steps.
        x_t, x0: (B, C, [T], H, W).
        t: (B,) the students' own (mapped) times.
        steps: (B,) step indices, int64 on the CPU.
        rows: (B,) rows of the prompts.
        clean: see :class:`State`.
    """

    size: Size
    x_t: Tensor
    x0: Tensor
    t: Tensor
    steps: Tensor
    rows: Tensor
    clean: Tensor | None = None


def step_shares(cascade: Cascade, draw: Draw, active: Sequence[int]) -> Tensor:
    """The probability of each active step, float64: 1 / (stages x steps of its stage), or 1 / steps."""
    if draw == "step":
        return torch.full((len(active),), 1 / len(active), dtype=torch.float64)
    stages = [cascade.steps[step].stage for step in active]
    weights = [1 / (len(set(stages)) * stages.count(stage)) for stage in stages]
    return torch.tensor(weights, dtype=torch.float64)


def pipelined_counts(shares: Tensor, batch_size: int) -> list[int]:
    """How many samples of a pipelined batch stand at each step: always the same, largest remainders first."""
    exact = (shares * batch_size).tolist()
    # Rounded before it is floored: 6 / 4 steps must not become 1.4999.
    counts = [int(value + 1e-9) for value in exact]
    order = sorted(range(len(counts)), key=lambda index: counts[index] - exact[index])
    for index in order[: batch_size - sum(counts)]:
        counts[index] += 1
    return counts


class Rollout:
    """Produces the states that an update starts from."""

    def __init__(
        self,
        backbone: X0Backbone,
        cascade: Cascade,
        prompts: Prompts,
        random: Randomness,
        batch_size: int,
        mode: Mode = "fresh",
        draw: Draw = "stage",
    ) -> None:
        self.backbone, self.cascade, self.prompts, self.random = backbone, cascade, prompts, random
        self.batch_size, self.mode, self.draw = batch_size, mode, draw
        self.carried: dict[int, State] = {}

    @property
    def pipelined(self) -> bool:
        """Whether an update's own predictions are the next one's states."""
        return self.mode == "pipelined"

    def states(self, student: nn.Module, active: Sequence[int]) -> list[State]:
        """States at the active steps, `batch_size` samples in all; see the module's text.

        Args:
            student: called without gradient for the steps before.
            active: indices of the steps that may be trained, ascending.
        """
        if not self.pipelined:
            return self._roll_out(student, self.drawn(active))
        states = []
        for step, count in zip(active, self.counts(active), strict=True):
            state = self.carried.pop(step, None)
            if state is None or len(state.rows) != count:
                state = self.roll_out(student, step, count)
            states.append(state)
        self.carried.clear()
        return states

    def shares(self, active: Sequence[int]) -> Tensor:
        """The probability of each active step (:func:`step_shares`)."""
        return step_shares(self.cascade, self.draw, active)

    def drawn(self, active: Sequence[int]) -> dict[int, int]:
        """How many samples stand at which step, drawn; the same on all processes (:meth:`Randomness.shared`)."""
        if self.mode == "fresh":
            return {active[self._pick(self.shares(active))]: self.batch_size}
        if self.mode == "stage":
            stage = self.cascade.steps[active[self._pick(self.shares(active))]].stage
            active = [step for step in active if self.cascade.steps[step].stage == stage]
        # One draw for all samples, evenly spaced: each count is within one of its expectation, which is exact.
        edges = self.shares(active).cumsum(0)
        places = (torch.arange(self.batch_size, dtype=torch.float64) + self.random.shared()) / self.batch_size
        chosen = torch.searchsorted(edges, places, right=True).clamp(max=len(active) - 1).tolist()
        return {step: chosen.count(index) for index, step in enumerate(active) if index in chosen}

    def _pick(self, shares: Tensor) -> int:
        at = torch.tensor(self.random.shared(), dtype=torch.float64)
        return min(int(torch.searchsorted(shares.cumsum(0), at, right=True)), len(shares) - 1)

    def counts(self, active: Sequence[int]) -> list[int]:
        """A pipelined batch's samples at each step (:func:`pipelined_counts`).

        Raises:
            ValueError: a step would get none.
        """
        counts = pipelined_counts(self.shares(active), self.batch_size)
        if 0 in counts:
            raise ValueError(
                f"rollout=pipelined holds a sample at each of the {len(active)} steps: a batch of {self.batch_size} "
                f"on a device would never train step {active[counts.index(0)]}; give more, or another rollout"
            )
        return counts

    def roll_out(self, student: nn.Module, step: int, count: int) -> State:
        """`count` new samples, from noise to just before `step`."""
        return self._roll_out(student, {step: count})[0]

    @torch.no_grad()
    def _roll_out(self, student: nn.Module, counts: Mapping[int, int]) -> list[State]:
        """New samples, so many to just before each step; a sample runs no further than its own."""
        first = self.cascade.steps[0]
        total = sum(counts.values())
        rows = self.prompts.draw(self.random, total)
        noise = self.random.normal((total, *self.backbone.latent_shape(first.size)))
        state = State(0, noise * self.cascade.initial_noise_scale, rows)
        conditioning = self.prompts.conditioning(rows)
        arrived = []
        for index in range(max(counts) + 1):
            if count := counts.get(index, 0):
                arrived.append(State(index, state.x_t[:count], state.rows[:count]))
                state = State(index, state.x_t[count:], state.rows[count:])
                conditioning = {name: value[count:] for name, value in conditioning.items()}
            if index < max(counts):
                state = self._next(state, self._x0(student, state.x_t, index, conditioning))
        return arrived

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
            known = [state.clean for state in group if state.clean is not None]
            clean = torch.cat(known) if known else None
            if x0.requires_grad:
                x0.retain_grad()  # its size by step is recorded
            predictions.append(Prediction(size, x_t, x0, t, indices, rows, clean))
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
