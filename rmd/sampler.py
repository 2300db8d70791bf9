"""Sampling through a cascade (Algorithm 2): one pure step function, keyed noise, and the offline loop.

Training roll-outs, `sample` and the server's scheduler all go through `advance_batch`.

Noise is keyed by (request seed, step), never by batch order: each item's values come from its own CPU generator,
seeded with the first 63 bits of BLAKE2b over "seed:step". Initial noise has step -1; the fresh noise of the move from
step k to step k + 1 has step k. So a request's noise is the same whatever it is batched with and on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rmd.cascade import Cascade, Step
from rmd.noise_schedule import NoiseSchedule
from rmd.size import Size
from rmd.upsampling import mix_noise, reinject

INITIAL_NOISE_STEP = -1


def noise_key(seed: int, step_index: int) -> int:
    """The generator seed of one request at one step: 63 bits of BLAKE2b("seed:step")."""
    digest = hashlib.blake2b(f"{seed}:{step_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def step_noise(
    shape: Sequence[int],
    seeds: Sequence[int],
    step_index: int | Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise, keyed by (seed, step).

    Args:
        shape: of one item, without the batch: (C, H, W) or (C, T, H, W).
        seeds: one an item.
        step_index: the step that was just predicted: one number, or one an item.

    Returns:
        (len(seeds), *shape), drawn in float32 on the CPU, then moved and cast. To a GPU the copy is queued, so that the
        host neither waits for what runs there nor keeps it waiting.
    """
    steps = [step_index] * len(seeds) if isinstance(step_index, int) else list(step_index)
    if len(steps) != len(seeds):
        raise ValueError(f"{len(seeds)} seeds and {len(steps)} step indices: give one of each an item")
    queued = torch.device(device).type == "cuda"
    noise = torch.empty((len(seeds), *shape), dtype=torch.float32, pin_memory=queued)
    for item, (seed, step) in enumerate(zip(seeds, steps, strict=True)):
        generator = torch.Generator().manual_seed(noise_key(int(seed), int(step)))
        torch.randn(tuple(shape), generator=generator, out=noise[item])
    return noise.to(device=device, dtype=dtype, non_blocking=queued)


def initial_noise(
    shape: Sequence[int],
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The noise a request starts from: `step_noise` at step -1. `shape` is one item's, without the batch."""
    return step_noise(shape, seeds, INITIAL_NOISE_STEP, device, dtype)


def advance_batch(
    schedule: NoiseSchedule,
    x_t: Tensor,
    x0_hat: Tensor,
    t: float | Tensor,
    t_next: float | Tensor,
    *,
    target_shape: Sequence[int] | None = None,
    intensity: float | Tensor = 1.0,
    noise: Tensor | None = None,
    noise_upsampling: str = "bilinear",
    x0_upsampling: str = "bilinear",
) -> Tensor:
    """Move a batch from its times `t` to `t_next`, given the predicted x0. Items may have different times.

    At the same side: `alpha' x0_hat + sigma' (a eps_hat + sqrt(1 - a^2) z)`, which is Euler or DDIM for a = 1 and a
    fresh-noise (LCM, DMD2) step for a = 0. To another side: re-injection (Eq. 4 and 10).

    Args:
        x_t, x0_hat: (B, C, [T], H, W), at the side of this step.
        t, t_next: one number or (B,), in [0, 1].
        target_shape: of the next step's latents, one item's shape without the batch; None or an equal grid means the
            same side.
        intensity: `a`, one number or (B,).
        noise: `z` at the next step's shape; None only where the intensity is the number 1.
        noise_upsampling: see `rmd.upsampling.upsample_noise`.
        x0_upsampling: see `rmd.upsampling.upsample`.

    Returns:
        float32 (float64 for float64 inputs), at the next step's side.

    Raises:
        ValueError: shapes that do not fit, or fresh noise missing.
    """
    if x_t.shape != x0_hat.shape:
        raise ValueError(f"x_t has shape {tuple(x_t.shape)}, x0_hat {tuple(x0_hat.shape)}: they must be equal")
    eps_hat = schedule.eps_from_x0(x_t, x0_hat, t)
    if target_shape is None or tuple(target_shape) == tuple(x_t.shape[1:]):
        return schedule.add_noise(x0_hat, mix_noise(eps_hat, noise, intensity), t_next)
    return reinject(x0_hat, eps_hat, schedule, t_next, target_shape, noise, intensity, noise_upsampling, x0_upsampling)


def next_time(cascade: Cascade, step_index: int) -> float | None:
    """The time in [0, 1] that a step leads to; None where it is the last one and ends in its own prediction."""
    if step_index + 1 < cascade.num_steps:
        return cascade.steps[step_index + 1].t
    return None if cascade.final_timestep is None else cascade.final_timestep / 1000


def next_size(cascade: Cascade, step_index: int) -> Size:
    """The size that a step leads to: the next step's, or its own after the last step."""
    return cascade.steps[min(step_index + 1, cascade.num_steps - 1)].size


def noise_intensity(cascade: Cascade, step_index: int, training: bool = False) -> float:
    """`a` for the move from a step to the next one: 1 after the last step, where nothing is re-injected."""
    if step_index + 1 >= cascade.num_steps:
        return 1.0
    if cascade.steps[step_index].size == cascade.steps[step_index + 1].size:
        intensity = cascade.step_noise_intensity
        if training and cascade.training_step_noise_intensity is not None:
            return cascade.training_step_noise_intensity
        return intensity[step_index] if isinstance(intensity, tuple) else intensity
    return cascade.training_noise_intensity if training else cascade.transition_noise_intensity


def needs_noise(cascade: Cascade, step_index: int, training: bool = False) -> bool:
    """Whether the move from a step to the next one takes fresh noise."""
    return noise_intensity(cascade, step_index, training) < 1


def advance(
    cascade: Cascade,
    step_index: int,
    x_t: Tensor,
    x0_hat: Tensor,
    schedule: NoiseSchedule,
    latent_shape_of: Callable[[Size], tuple[int, ...]],
    noise: Tensor | None = None,
    *,
    training: bool = False,
) -> Tensor:
    """The next state of a batch that stands at one step of one cascade.

    After the last step that is `x0_hat` itself, or the deterministic step to the cascade's `final_timestep`.

    Args:
        step_index: of the step that `x0_hat` was predicted at.
        x_t, x0_hat: (B, C, [T], H, W).
        latent_shape_of: a backbone's `latent_shape`.
        noise: (B, *latent_shape_of(next size)); needed when `needs_noise(cascade, step_index, training)`.
        training: use `training_noise_intensity` at a change of size, `training_step_noise_intensity` inside a stage.

    Returns:
        float32 (float64 for float64 inputs) at the next step's side.

    Raises:
        ValueError: no such step, shapes that do not fit, or fresh noise missing.
    """
    if not 0 <= step_index < cascade.num_steps:
        raise ValueError(f"step {step_index} is not one of the cascade's {cascade.num_steps} steps")
    t_next = next_time(cascade, step_index)
    if t_next is None:
        return x0_hat if x0_hat.dtype == torch.float64 else x0_hat.float()
    return advance_batch(
        schedule,
        x_t,
        x0_hat,
        cascade.steps[step_index].t,
        t_next,
        target_shape=latent_shape_of(next_size(cascade, step_index)),
        intensity=noise_intensity(cascade, step_index, training),
        noise=noise,
        noise_upsampling=cascade.noise_upsampling,
        x0_upsampling=cascade.x0_upsampling,
    )


class X0Predictor(Protocol):
    """What `sample` asks of a backbone (`rmd.backbones.base.Backbone` has it)."""

    schedule: NoiseSchedule
    device: torch.device

    def latent_shape(self, size: Size) -> tuple[int, ...]: ...

    def predict_x0(self, latents: Tensor, t: Tensor, conditioning: Mapping[str, Tensor], size: Size) -> Tensor: ...

    def guided_x0(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: Mapping[str, Tensor],
        uncond: Mapping[str, Tensor],
        scale: float,
        size: Size,
    ) -> Tensor: ...


def sample(
    backbone: X0Predictor,
    cascade: Cascade,
    conditioning: Mapping[str, Tensor],
    seeds: Sequence[int],
    uncond: Mapping[str, Tensor] | None = None,
    on_step: Callable[[int, Step, Tensor], None] | None = None,
    on_state: Callable[[int, Step, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Run a cascade from noise to clean latents (Algorithm 2).

    Args:
        conditioning: the encoded prompts, batch first, one item a seed.
        seeds: one a sample.
        uncond: the encoded empty prompt, of the same batch; needed when the cascade's guidance scale is not 1.
        on_step: called after each step with its index, the step and its `x0_hat`.
        on_state: called after it with the state that follows; it may return another one to go on with.

    Returns:
        latents (B, *latent_shape(cascade.full_size)), float32.

    Raises:
        ValueError: guidance without `uncond`, or no seeds.
    """
    if not seeds:
        raise ValueError("give at least one seed")
    guided = cascade.guidance_scale != 1.0
    if guided and uncond is None:
        raise ValueError(f"guidance scale {cascade.guidance_scale} needs the unconditional prompt ('uncond')")
    device = backbone.device
    x = initial_noise(backbone.latent_shape(cascade.steps[0].size), seeds, device) * cascade.initial_noise_scale
    for index, step in enumerate(cascade.steps):
        t = torch.full((len(seeds),), step.t, dtype=torch.float64, device=device)
        if guided and uncond is not None:
            x0_hat = backbone.guided_x0(x, t, conditioning, uncond, cascade.guidance_scale, step.size)
        else:
            x0_hat = backbone.predict_x0(x, t, conditioning, step.size)
        if on_step is not None:
            on_step(index, step, x0_hat)
        noise = None
        if needs_noise(cascade, index):
            following = cascade.steps[index + 1].size
            noise = step_noise(backbone.latent_shape(following), seeds, index, device)
        x = advance(cascade, index, x, x0_hat, backbone.schedule, backbone.latent_shape, noise)
        if on_state is not None and (changed := on_state(index, step, x)) is not None:
            x = changed
    return x
