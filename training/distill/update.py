"""One update: the student's step and the fake score's, each over all micro-batches and processes.

A micro-batch's gradient is that of its mean loss; added up, divided by their number and averaged over processes they
give the gradient of the mean over the whole batch. What a micro-batch draws depends on its number alone
(:meth:`training.runtime.randomness.Randomness.at`), so one process and several compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from training.distill.batches import Batches
from training.distill.figures import step_figures
from training.distill.methods.base import DistributionMatching, Matched, Scores
from training.distill.methods.warm_start import warm_start_loss
from training.distill.optimizer import AveragedWeights, MasterAdamW
from training.distill.roles import Networks, trained_parameters
from training.distill.settings import DistillSettings
from training.runtime.randomness import Randomness
from training.runtime.sharding import local

_STUDENT, _FAKE = 0, 1  # parts of an update; its further fake-score updates are 2, 3, ...


@dataclass
class Kept:
    """What a micro-batch's student update leaves for the fake score's first.

    Attributes:
        matched: its predictions.
        shared: what both scores made of them, where the fake score's update is to use the same.
    """

    matched: list[Matched]
    shared: list[Scores]


class Means:
    """Means of figures that each micro-batch gives."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        """One micro-batch's figure."""
        pair = self._sums.setdefault(name, [0.0, 0.0])
        pair[0] += value
        pair[1] += 1

    def add_all(self, figures: Mapping[str, float]) -> None:
        """Several figures of one micro-batch."""
        for name, value in figures.items():
            self.add(name, value)

    def all(self) -> dict[str, float]:
        """The means by name."""
        return {name: total / count for name, (total, count) in self._sums.items()}


class Updater:
    """The trained networks with their optimisers.

    Attributes:
        rollouts: one a micro-batch, each with the states that it carries on.
        random: what all of them draw from.
    """

    def __init__(
        self,
        method: DistributionMatching,
        networks: Networks,
        settings: DistillSettings,
        accelerator: Accelerator,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.method, self.networks, self.settings = method, networks, settings
        self.processes = accelerator.num_processes
        self.batches = Batches.of(settings, self.processes, accelerator.process_index)
        self.random = Randomness(settings.seed, method.backbone.device, dtype)
        self.rollouts = [method.rollout(self.random) for _ in range(self.batches.count)]
        for rollout in self.rollouts:
            rollout.batch_size = self.batches.size
        if settings.rollout == "pipelined":
            self.rollouts[0].counts(range(method.cascade.num_steps))  # refuses what is too small
        student = trained_parameters(networks.student)
        fake = trained_parameters(networks.fake) | method.critic_parameters()
        fake_clip = settings.clip_norm if settings.clip_fake else math.inf
        self.student_optimizer, self.fake_optimizer = (
            MasterAdamW(parameters, rate, settings.betas, settings.weight_decay, clip_norm, settings.second_moment)
            for parameters, rate, clip_norm in (
                (student, settings.generator_rate, settings.clip_norm),
                (fake, settings.fake_rate, fake_clip),
            )
        )
        place = "cpu" if settings.ema_on_cpu else None
        self.ema = AveragedWeights(self.student_optimizer.master_state(), settings.ema_decay, place)

    def train_student(self, update: int, rate: float, warm: bool, figures: dict[str, float]) -> list[Kept]:
        """The student's step by the method's loss, or by regression of the teacher (`warm`); the average follows."""
        self.student_optimizer.zero_grad()
        means, kept = Means(), []
        for number, rollout in enumerate(self.rollouts):
            self._begin(update, _STUDENT, number)
            states = self.method.states(rollout, self.networks.student, self.method.active_steps(update))
            with self._activations():
                predictions = rollout.predict(self.networks.student, states)
                matched = self.method.match(predictions)
                shared: list[Scores] = []
                if warm:
                    loss = warm_start_loss(self.method, predictions, self.networks.teacher, self.random)
                    means.add("warm_start_loss", float(loss.detach()))
                else:
                    loss, shared = self._generator_loss(matched, means)
                    means.add("generator_loss", float(loss.detach()))
            (loss / self.batches.count).backward()  # type: ignore[no-untyped-call]
            means.add_all(step_figures(predictions, matched, self.batches.count * self.batches.size))
            kept.append(self._kept(matched, shared))
        figures.update(means.all())
        figures["generator_grad_norm"] = self.student_optimizer.step(rate, self._reduce)
        self.ema.update(self.student_optimizer.master_state())
        return kept

    def train_fake(
        self, update: int, number: int, rate: float, kept: Sequence[Kept], figures: dict[str, float]
    ) -> None:
        """The fake score's step number `number` of an update, on what the student's left or on new samples."""
        # Gradients that the generator's loss may have left in the fake network (GAN, patch loss) are dropped.
        self.fake_optimizer.zero_grad()
        means = Means()
        for index, rollout in enumerate(self.rollouts):
            self._begin(update, _FAKE + number, index)
            if kept:
                matched, shared = kept[index].matched, kept[index].shared
            else:
                with torch.no_grad():
                    active = self.method.active_steps(update)
                    states = self.method.states(rollout, self.networks.student, active)
                    matched, shared = self.method.match(rollout.predict(self.networks.student, states)), []
            with self._activations():
                loss = self._critic_loss(matched, shared)
            (loss / self.batches.count).backward()  # type: ignore[no-untyped-call]
            means.add("fake_loss", float(loss.detach()))
        figures.update(means.all())
        figures["fake_grad_norm"] = self.fake_optimizer.step(rate, self._reduce)

    def _begin(self, update: int, part: int, number: int) -> None:
        self.random.at(update, part, self.batches.first + number)

    def _generator_loss(self, matched: Sequence[Matched], means: Means) -> tuple[Tensor, list[Scores]]:
        """The loss, and the scores that the fake score's update shares, if it does."""
        method, networks = self.method, self.networks
        total = sum(len(m.steps) for m in matched)
        samples = [method.score_sample(m, self.random) for m in matched]
        shared: list[Scores] = []
        parts = []
        for m, sample in zip(matched, samples, strict=True):
            scores = method.scores(m, sample, networks.teacher, networks.fake)
            if self.settings.shared_score_sample:
                shared.append(scores)
            part, figures = method.generator_loss(m, scores, self.random)
            means.add_all(figures)
            parts.append(part * (len(m.steps) / total))
        return torch.stack(parts).sum(), shared

    def _critic_loss(self, matched: Sequence[Matched], shared: Sequence[Scores]) -> Tensor:
        fake = self.networks.fake
        total = sum(len(m.steps) for m in matched)
        parts = []
        for index, m in enumerate(matched):
            scores = shared[index] if shared else None
            if scores is not None and self.batches.count > 1:
                scores = replace(scores, fake=self.method.fake_x0(m, scores.sample, fake))
            parts.append(self.method.critic_loss(m, fake, self.random, scores) * (len(m.steps) / total))
        return torch.stack(parts).sum()

    def _kept(self, matched: Sequence[Matched], shared: Sequence[Scores]) -> Kept:
        detached = [replace(m, y=m.y.detach()) for m in matched]
        scores = [replace(s, sample=replace(s.sample, y=s.sample.y.detach())) for s in shared]
        if self.batches.count > 1:
            # The fake score's graph of one micro-batch is as large as its update: made again rather than held for all.
            scores = [replace(s, fake=s.fake.detach()) for s in scores]
        return Kept(detached, scores)

    def _activations(self) -> AbstractContextManager[object]:
        """Where what the backward pass needs is kept."""
        if not self.settings.offload_activations:
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.method.backbone.device.type == "cuda")

    def _reduce(self, grads: list[Tensor]) -> None:
        """Average over processes; sharded gradients are averaged already."""
        if self.processes == 1:
            return
        own = [grad for grad in grads if not isinstance(grad, DTensor)]
        # In place, one after the other: accelerate's reduce, or one flat tensor, would hold them all twice.
        for grad in own:
            torch.distributed.all_reduce(grad)
        if own:
            torch._foreach_div_(own, self.processes)


@contextmanager
def averaged_student(updater: Updater) -> Iterator[torch.nn.Module]:
    """The student itself, carrying its averaged weights meanwhile; its own wait on the CPU."""
    student = updater.networks.student
    own = {name: local(parameter.detach()) for name, parameter in trained_parameters(student).items()}
    before = {name: value.to("cpu", copy=True) for name, value in own.items()}
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(updater.ema.weights[name])
        try:
            yield student
        finally:
            for name, value in own.items():
                value.copy_(before[name])
