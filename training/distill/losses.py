"""Losses of distribution matching distillation, as pure functions of tensors.

Latents are (B, C, [T], H, W). Generator losses come back per sample, shape (B,), so that weights can be applied before
the mean. `y` is the student's prediction at the side where it is matched, `real` and `fake` are the x0 predictions of
teacher and fake score on the noised `y`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rmd.noise_schedule import NoiseSchedule

PSEUDO_HUBER_SCALE = 0.00054
"""`c / sqrt(dim)` of the vector-norm pseudo-Huber metric (iCT)."""
ELEMENTWISE_HUBER_C = 1e-3
MAX_SNR_WEIGHT = 5.0


def dmd_direction(y: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """`d = y - stop_grad(y + real - fake)`: its value is `fake - real`, its gradient with respect to `y` the identity.

    With exact scores `d = sigma^2 / alpha * (score_fake - score_real)`, the integrand of the KL divergence's gradient.
    """
    return y - (y + real - fake).detach()


def pseudo_huber(d: Tensor, scale: float = PSEUDO_HUBER_SCALE) -> Tensor:
    """Eq. 8: `(sqrt(||d||^2 + c^2) - c) / sqrt(dim)` with the per-sample vector norm and `c = scale sqrt(dim)`.

    The gradient of a sample is `d / sqrt(||d||^2 + c^2) / sqrt(dim)`: parallel to `d`, of bounded length.

    Returns:
        (B,).
    """
    flat = d.flatten(1)
    root = math.sqrt(flat.shape[1])
    c = scale * root
    return ((flat.square().sum(1) + c * c).sqrt() - c) / root


def elementwise_huber(d: Tensor, c: float = ELEMENTWISE_HUBER_C) -> Tensor:
    """TDM's `mean(sqrt(d^2 + c^2) - c)` over the elements of a sample. Returns (B,)."""
    return ((d.square() + c * c).sqrt() - c).flatten(1).mean(1)


def sized_huber(d: Tensor) -> Tensor:
    """The public reference implementation's: :func:`elementwise_huber` with `c = 1e-3 sqrt(dim / 16384)`. Returns (B,).

    16384 are the values of a 512 px latent of four channels, so `c` grows with a sample's size.
    """
    return elementwise_huber(d, ELEMENTWISE_HUBER_C * math.sqrt(d[0].numel() / 16384))


def squared(d: Tensor) -> Tensor:
    """`||d||^2 / (2 dim)`: its gradient is `d / dim`. Returns (B,)."""
    return 0.5 * d.square().flatten(1).mean(1)


GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "pseudo_huber": pseudo_huber,
    "elementwise_huber": elementwise_huber,
    "sized_huber": sized_huber,
    "squared": squared,
}


def normaliser(y: Tensor, real: Tensor, floor: float = 1e-6) -> Tensor:
    """`mean |y - real|` of each sample, at least `floor`, detached (DMD): what its loss is divided by. Returns (B,)."""
    return (y - real).detach().abs().flatten(1).mean(1).clamp(min=floor)


def uncapped_snr(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """`SNR(t)`, float64: turns the squared error of x0 into that of the noise. The public reference's weight too."""
    return torch.exp(schedule.log_snr(t))


def snr_weight(schedule: NoiseSchedule, t: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """`min(SNR(t) (r / R)^2, 5)`, float64.

    Args:
        schedule: of the backbone.
        t: (B,) times on the teacher's axis.
        scale: `R / r`, one number or (B,).
    """
    return (torch.exp(schedule.log_snr(t)) / torch.as_tensor(scale, dtype=torch.float64) ** 2).clamp(max=MAX_SNR_WEIGHT)


def mean_snr_weight(schedule: NoiseSchedule, low: float, high: float, scale: float = 1.0, points: int = 512) -> float:
    """The mean of :func:`snr_weight` over times uniform in (low, high), by the midpoint rule."""
    t = low + (high - low) * (torch.arange(points, dtype=torch.float64) + 0.5) / points
    return float(snr_weight(schedule, t, scale).mean())


def velocity_weight(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """`1 / sigma(t)^2`, float64: turns the squared error of x0 into that of the velocity, in both schedule families."""
    return 1.0 / schedule.sigma(t).to(torch.float64).square()


def fake_score_loss(x0: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Eq. 9: `mean_batch(weight * mean((x0 - target)^2))`; the target is detached.

    Args:
        x0: the fake score's predictions.
        target: the student's `y`.
        weight: (B,).
    """
    error = (x0 - target.detach()).square().flatten(1).mean(1)
    return (weight.to(error) * error).mean()


def mmd_loss(student_tokens: Tensor, real_tokens: Tensor, c: float = 1e-3) -> Tensor:
    """SwD's patch loss: the linear-kernel MMD of network tokens, one value a picture and channel.

    The squared difference of the token means of each channel, through a pseudo-Huber: `sqrt(diff^2 + c^2) - c`.

    Args:
        student_tokens, real_tokens: (B, N, D); the token counts may differ.
    """
    difference = student_tokens.float().mean(1) - real_tokens.detach().float().mean(1)
    return ((difference.square() + c * c).sqrt() - c).mean()


def gan_generator_loss(student_logits: Tensor) -> Tensor:
    """DMD2's non-saturating loss `softplus(-D(student))`, averaged."""
    return F.softplus(-student_logits.float()).mean()


def gan_discriminator_loss(real_logits: Tensor, student_logits: Tensor) -> Tensor:
    """`softplus(-D(real)) + softplus(D(student))`, averaged."""
    return F.softplus(-real_logits.float()).mean() + F.softplus(student_logits.float()).mean()
