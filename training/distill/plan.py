"""What a distillation needs of every GPU, and how much work an update is, before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from rmd.backbones.base import Backbone
from rmd.cascade import Cascade
from rmd.size import Size
from training.distill.batches import Batches
from training.distill.memory import forward_flop, passes_peak, with_offload
from training.distill.roles import last_layer_in_float32, network_of, trainable_copy, trained_parameters
from training.distill.rollout import pipelined_counts, step_shares
from training.distill.settings import DistillSettings
from training.runtime.sharding import group_bytes

GB = 1e9
ASSUMED_TFLOPS = 350.0
"""What a GPU of the H100's kind is taken to do of its 989 dense bfloat16 TFLOP/s: an estimate, nothing was measured."""
CONTEXT = 1.0e9
"""What CUDA and its libraries hold beside any tensor; an estimate."""


@dataclass(frozen=True)
class Plan:
    """A distillation's needs.

    Attributes:
        cascade: that is trained.
        parameters: by role or component.
        training: bytes on each GPU by part, while it trains.
        encoding: the same while prompts are encoded; text encoders leave the device afterwards.
        host: bytes in main memory by part, a process.
        batches: of each process.
        flop: of one update, over all processes.
        processes: that share it.
    """

    cascade: Cascade
    parameters: Mapping[str, int]
    training: Mapping[str, int]
    encoding: Mapping[str, int]
    host: Mapping[str, int]
    batches: Batches
    flop: float
    processes: int

    @property
    def needed(self) -> int:
        """Bytes that each GPU must have."""
        return max(sum(self.training.values()), sum(self.encoding.values()))

    def updates_an_hour(self, tflops: float = ASSUMED_TFLOPS) -> float:
        """At so many TFLOP/s on each GPU."""
        return 3600 * tflops * 1e12 * self.processes / self.flop


def make_plan(
    backbone: Backbone,
    cascade: Cascade,
    settings: DistillSettings,
    *,
    processes: int = 1,
    guidance_scale: float | None = None,
    device: str = "cuda",
) -> Plan:
    """Plan a distillation.

    Args:
        backbone: on the meta device, in the dtype that it will run in.
        cascade: that is to be trained.
        processes: GPUs of the run.
        guidance_scale: of the teacher; the settings' or the backbone's own by default.
        device: "cuda" or "cpu", which decides the attention kernel.

    Raises:
        ValueError: the batch cannot be spread over the processes.
    """
    batches = Batches.of(settings, processes)
    teacher = backbone.component_modules()["denoiser"].eval().requires_grad_(False)
    last_layer_in_float32(teacher, backbone.schedule)
    student, fake = trainable_copy(teacher, settings), trainable_copy(teacher, settings)
    scale = guidance_scale or settings.guidance_scale or backbone.teacher_guidance
    fused = device != "cpu" or backbone.tokens(cascade.full_size) > 128
    passes = with_offload(
        lambda: passes_peak(
            backbone, student, teacher, fake, _groups(cascade, settings, batches.size), cascade.full_size,
            guided=scale != 1.0, fused_attention=fused,
        ),
        settings.offload_activations,
    )  # fmt: skip
    training = {**_held(teacher, student, settings, processes), "activations": passes}
    modules = backbone.component_modules()
    text = sum(size_of(module) for name, module in modules.items() if name.startswith("text_encoder"))
    decoder = size_of(modules["decoder"]) if "decoder" in modules else 0
    both = {"decoder": decoder, **({"CUDA": int(CONTEXT)} if device != "cpu" else {})}
    average = 4 * _count(trained_parameters(student).values())
    shares = processes if settings.sharding else 1
    return Plan(
        cascade=cascade,
        parameters={
            "denoiser": _count(teacher.parameters()),
            "trained": _count(trained_parameters(student).values()),
            "text encoders": sum(
                _count(module.parameters()) for name, module in modules.items() if name.startswith("text_encoder")
            ),
        },
        training={**training, **both},
        encoding={"teacher": size_of(teacher), "text encoders": text, **both},
        host={"average": average // shares} if settings.ema_on_cpu else {},
        batches=batches,
        flop=settings.batch_size * sample_flop(backbone, teacher, cascade, settings, guided=scale != 1.0),
        processes=processes,
    )


def size_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each counted once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _count(parameters: object) -> int:
    return sum(parameter.numel() for parameter in parameters)  # type: ignore[attr-defined]


def _held(teacher: nn.Module, student: nn.Module, settings: DistillSettings, processes: int) -> dict[str, int]:
    """Bytes of weights, masters, moments, average and gradients; student and fake score are alike.

    Buffers (position tables) are held three times, and never sharded.
    """
    trained = list(trained_parameters(student).values())
    count = _count(trained)
    moment = count * (1 + 4 / 256) if settings.second_moment == "8bit" else 4 * count
    if settings.betas[0]:
        moment += 4 * count
    average = 0 if settings.ema_on_cpu else 4 * count
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in teacher.buffers())
    frozen = size_of(teacher) - buffers
    if settings.sharding:
        gathered = group_bytes(student, network_of(student)[1])
        return {
            "teacher": frozen // processes,
            "student": int(4 * count + moment + average) // processes,
            "fake score": int(4 * count + moment) // processes,
            "gradients": 4 * count // processes,
            "gathered blocks": gathered,
            "buffers": 3 * buffers,
        }
    working = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    masters = sum(4 * parameter.numel() for parameter in trained if parameter.dtype != torch.float32)
    return {
        "teacher": frozen,
        "student": int(working + masters + moment + average),
        "fake score": int(working + masters + moment),
        "gradients": 4 * count,
        "buffers": 3 * buffers,
    }


def _groups(cascade: Cascade, settings: DistillSettings, samples: int) -> list[tuple[Size, int]]:
    """At which sizes the student runs with gradient; of what is drawn, the dearest."""
    if settings.rollout in ("fresh", "stage"):
        return [(cascade.full_size, samples)]
    shares = step_shares(cascade, settings.draw, range(cascade.num_steps))
    if settings.rollout == "pipelined":
        exact = pipelined_counts(shares, samples)
        counts = {size: sum(exact[i] for i in _steps_at(cascade, size)) for size in cascade.sizes}
        return [(size, count) for size, count in counts.items() if count]
    groups, left = [], samples  # each size has its share of a mixed batch, rounded down or up
    for size in reversed(cascade.sizes):
        share = float(shares[_steps_at(cascade, size)].sum())
        count = min(left, math.ceil(samples * share - 1e-9))
        groups.append((size, count))
        left -= count
    return [(size, count) for size, count in reversed(groups) if count]


def _steps_at(cascade: Cascade, size: Size) -> list[int]:
    return [index for index, step in enumerate(cascade.steps) if step.size == size]


def sample_flop(
    backbone: Backbone, network: nn.Module, cascade: Cascade, settings: DistillSettings, *, guided: bool = True
) -> float:
    """Floating point operations of one sample in one update, the mean over the steps as they are drawn.

    A pass with gradient costs three forward ones, four where blocks are run again (gradient checkpointing).
    """
    cost = {size: forward_flop(backbone, network, size) for size in {*cascade.sizes, cascade.full_size}}
    steps, full = [cost[step.size] for step in cascade.steps], cost[cascade.full_size]
    trained = 4 if settings.gradient_checkpointing else 3
    shares: list[float] = step_shares(cascade, settings.draw, range(cascade.num_steps)).tolist()
    rolled = sum(share * sum(steps[:index]) for index, share in enumerate(shares))
    if settings.rollout == "pipelined":
        rolled = 0.0
    own = sum(share * step for share, step in zip(shares, steps, strict=True))
    student = rolled + trained * own
    scores = (2 if guided else 1) * full + (0 if settings.shared_score_sample else full)
    fresh = settings.fake_steps - (0 if settings.fake_first else 1)  # the fake score's updates on samples of their own
    further = 0.0 if settings.rollout == "pipelined" else fresh * (rolled + own)
    return student + scores + settings.fake_steps * trained * full + further
