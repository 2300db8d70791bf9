"""The upsampling transformation and predicted-noise re-injection (Eq. 4 and 10).

Latents are (B, C, H, W) or, for film, (B, C, T, H, W). A target shape may be (H, W), (T, H, W) or a full latent shape
(C, H, W) / (C, T, H, W): its last two (three for film) numbers count; (H, W) for film keeps the frames.

`U` is bilinear (or, for the prediction itself, bicubic) without corner alignment or antialiasing, frame by frame;
where the number of latent frames differs it is linear over time as well. Towards a smaller grid (the way down in
high-low-high sampling) `U` is the area mean, since interpolation would alias, and noise is always renormalised there:
the mean of s x s values has only 1/s of their standard deviation, which no intensity could make up for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from rmd.fields import NOISE_UPSAMPLINGS, X0_UPSAMPLINGS
from rmd.noise_schedule import NoiseSchedule, broadcast_to_samples, to_compute_dtype


def _target_grid(x: Tensor, target_shape: Sequence[int]) -> tuple[int, ...]:
    num_dims = x.ndim - 2
    if num_dims not in (2, 3):
        raise ValueError(f"latents must be (B, C, H, W) or (B, C, T, H, W), not {tuple(x.shape)}")
    grid = tuple(int(n) for n in target_shape)
    if num_dims == 3 and len(grid) == 2:
        grid = (x.shape[2], *grid)
    if len(grid) < num_dims or min(grid) < 1:
        raise ValueError(f"target shape {tuple(target_shape)} does not fit latents of shape {tuple(x.shape)}")
    return grid[-num_dims:]


def _shrinks(x: Tensor, grid: tuple[int, ...]) -> bool:
    """Whether the target is smaller on some axis and larger on none."""
    return all(new <= old for new, old in zip(grid, x.shape[2:], strict=True)) and grid != tuple(x.shape[2:])


def _resize(x: Tensor, grid: tuple[int, ...], mode: str) -> Tensor:
    """Interpolate the trailing axes of `x` to `grid` with "bilinear", "bicubic", "nearest-exact" or "area"."""
    if grid == tuple(x.shape[2:]):
        return x
    if x.ndim == 5 and grid[0] == x.shape[2]:
        frames = _resize(x.flatten(1, 2), grid[1:], mode)
        return frames.reshape(*x.shape[:3], *grid[1:])
    if mode == "bicubic":
        if x.ndim == 4:
            return F.interpolate(x, size=grid, mode="bicubic", align_corners=False)
        return _resize(_resize(x, (x.shape[2], *grid[1:]), "bicubic"), grid, "bilinear")
    if mode == "bilinear":
        return F.interpolate(x, size=grid, mode="trilinear" if x.ndim == 5 else "bilinear", align_corners=False)
    return F.interpolate(x, size=grid, mode=mode)


@lru_cache(maxsize=256)
def _axis_std(length: int, target: int, mode: str) -> Tensor:
    """Standard deviation (float64, shape (target,)) of unit white noise after resizing one axis.

    Each output is a weighted sum of inputs, so it is the norm of a row of the axis' interpolation matrix.
    """
    identity = torch.eye(length, dtype=torch.float64)[None]
    if mode == "area":
        rows = F.interpolate(identity, size=target, mode="area")[0]
    else:
        rows = F.interpolate(identity, size=target, mode="linear", align_corners=False)[0]
    return rows.square().sum(dim=0).sqrt()


def resized_noise_std(source: Sequence[int], target: Sequence[int], mode: str = "bilinear") -> Tensor:
    """The exact standard deviation at every position of unit white noise resized from grid `source` to `target`.

    The interpolation is separable, so it is an outer product over the axes. Bilinear 2x: 0.625 inside, more at the
    border, where a position has fewer distinct neighbours.

    Args:
        source, target: (H, W) or (T, H, W).
        mode: "bilinear" or "area".

    Returns:
        float64, of shape `target`.
    """
    std = torch.ones((), dtype=torch.float64)
    for old, new in zip(source, target, strict=True):
        axis = torch.ones(new, dtype=torch.float64) if old == new else _axis_std(old, new, mode)
        std = std[..., None] * axis
    return std


def upsample(x: Tensor, target_shape: Sequence[int], mode: str = "bilinear") -> Tensor:
    """`U`: resize latents to another grid; the identity when the grid is already that. Differentiable.

    Args:
        x: (B, C, H, W) or (B, C, T, H, W).
        target_shape: see the module's text.
        mode: "bilinear" or "bicubic" (both the area mean towards a smaller grid), "nearest_block" or "area".

    Returns:
        float32, or float64 for a float64 input.

    Raises:
        ValueError: an unknown mode, or a target that does not fit.
    """
    if mode not in (*X0_UPSAMPLINGS, "nearest_block", "area"):
        raise ValueError(f"mode {mode!r} is not one of bilinear, bicubic, nearest_block, area")
    (x,) = to_compute_dtype(x)
    grid = _target_grid(x, target_shape)
    if mode in X0_UPSAMPLINGS and _shrinks(x, grid):
        mode = "area"
    return _resize(x, grid, "nearest-exact" if mode == "nearest_block" else mode)


def upsample_noise(eps: Tensor, target_shape: Sequence[int], mode: str = "bilinear") -> Tensor:
    """`U(eps_hat)`: resize predicted noise.

    - "bilinear": as the paper. White noise comes out with a standard deviation of 0.625 at 2x.
    - "renormalised": bilinear, divided at each position by the exact standard deviation that white noise has there, so
      every position keeps unit variance (a global factor would leave the border too strong). Neighbours stay
      correlated.
    - "nearest_block": every value repeated in an s x s block (nearest index where s is not whole): unit variance, and
      the noise's own distribution is kept.

    Towards a smaller grid every mode is the renormalised area mean.

    Raises:
        ValueError: an unknown mode, or a target that does not fit.
    """
    if mode not in NOISE_UPSAMPLINGS:
        raise ValueError(f"noise_upsampling {mode!r} is not one of {', '.join(NOISE_UPSAMPLINGS)}")
    (eps,) = to_compute_dtype(eps)
    grid = _target_grid(eps, target_shape)
    if grid == tuple(eps.shape[2:]):
        return eps
    if _shrinks(eps, grid):
        return _resize(eps, grid, "area") / resized_noise_std(eps.shape[2:], grid, "area").to(eps)
    if mode == "nearest_block":
        return _resize(eps, grid, "nearest-exact")
    resized = _resize(eps, grid, "bilinear")
    if mode == "renormalised":
        resized = resized / resized_noise_std(eps.shape[2:], grid).to(resized)
    return resized


def mix_noise(eps: Tensor, noise: Tensor | None, intensity: float | Tensor) -> Tensor:
    """`a eps + sqrt(1 - a^2) z` (Eq. 10): keeps the variance where `eps` has unit variance.

    Args:
        eps: predicted noise, already at the target's shape.
        noise: fresh noise `z` of the same shape; may be None where the intensity is the number 1.
        intensity: `a` in [0, 1], one number or one an item (B,).

    Raises:
        ValueError: fresh noise is needed and missing, its shape differs, or a number outside [0, 1].
    """
    if not isinstance(intensity, Tensor):
        if not 0 <= intensity <= 1:
            raise ValueError(f"a noise intensity must be from 0 to 1, not {intensity}")
        if intensity == 1:
            return eps
    if noise is None:
        raise ValueError("a noise intensity below 1 needs fresh noise, and none was given")
    if noise.shape != eps.shape:
        raise ValueError(f"fresh noise has shape {tuple(noise.shape)}, but {tuple(eps.shape)} is needed")
    eps, noise = to_compute_dtype(eps, noise)
    if not isinstance(intensity, Tensor):
        return intensity * eps + math.sqrt(1 - intensity**2) * noise
    a = intensity.to(torch.float64)
    b = (1 - a.square()).clamp(min=0).sqrt()
    return broadcast_to_samples(a, eps) * eps + broadcast_to_samples(b, eps) * noise


def reinject(
    x0_hat: Tensor,
    eps_hat: Tensor,
    schedule: NoiseSchedule,
    t_next: float | Tensor,
    target_shape: Sequence[int],
    noise: Tensor | None,
    intensity: float | Tensor,
    noise_upsampling: str = "bilinear",
    x0_upsampling: str = "bilinear",
) -> Tensor:
    """Hand a prediction over to another side (Eq. 4 and 10): `alpha' U(x0_hat) + sigma' (a U(eps_hat) + b z)`.

    Args:
        x0_hat, eps_hat: the prediction at the old side.
        schedule: of the backbone.
        t_next: the next step's time at the new side, one number or (B,).
        target_shape: of the new side (see the module's text).
        noise: `z`, standard normal at the new side; None only where the intensity is the number 1.
        intensity: `a`, one number or (B,).
        noise_upsampling: see `upsample_noise`.
        x0_upsampling: "bilinear" or "bicubic", see `upsample`.

    Returns:
        float32 (float64 for float64 inputs), at the new side.
    """
    eps_mix = mix_noise(upsample_noise(eps_hat, target_shape, noise_upsampling), noise, intensity)
    return schedule.add_noise(upsample(x0_hat, target_shape, x0_upsampling), eps_mix, t_next)
