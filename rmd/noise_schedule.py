"""Noise schedules: alpha, sigma, logSNR and the conversions between x0, noise and velocity.

`t` runs from 0 (data) to 1 (noise); a network's "timestep" is `1000 t`. `x_t = alpha(t) x0 + sigma(t) eps`.
Everything that depends on `t` alone is computed in float64; a tensor `t` has shape (B,) (or is a scalar) and is
broadcast over the trailing dimensions of the samples. The conversions of samples compute in float32, or in float64
when an input is float64, and return that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

Time = TypeVar("Time", float, Tensor)

NUM_TRAIN_TIMESTEPS = 1000


def _apply(value: Time, function: Callable[[Tensor], Tensor]) -> Time:
    """Run a tensor function on a float or a tensor, in float64, and return what was given."""
    if isinstance(value, Tensor):
        return function(value.to(torch.float64))
    return cast(Time, function(torch.tensor(float(value), dtype=torch.float64)).item())


def broadcast_to_samples(coefficient: float | Tensor, samples: Tensor) -> float | Tensor:
    """Shape a (B,) coefficient as (B, 1, ..., 1) in the dtype and on the device of `samples`."""
    if not isinstance(coefficient, Tensor):
        return coefficient
    if coefficient.ndim == 0:
        return coefficient.to(samples)
    if coefficient.ndim != 1 or coefficient.shape[0] not in (1, samples.shape[0]):
        raise ValueError(
            f"a per-item coefficient must have shape ({samples.shape[0]},) to match the batch, "
            f"not {tuple(coefficient.shape)}"
        )
    return coefficient.to(samples).reshape(-1, *[1] * (samples.ndim - 1))


def to_compute_dtype(*samples: Tensor) -> tuple[Tensor, ...]:
    """Promote samples to float32, or to float64 where one of them already is."""
    dtype = torch.float64 if any(s.dtype == torch.float64 for s in samples) else torch.float32
    return tuple(s.to(dtype) for s in samples)


class NoiseSchedule(ABC):
    """One family of noise schedules."""

    @abstractmethod
    def log_snr(self, t: Time) -> Time:
        """`ln(alpha^2 / sigma^2)` at time `t`; infinite where alpha or sigma is zero."""

    @abstractmethod
    def time_from_log_snr(self, log_snr: Time) -> Time:
        """The time at which `log_snr(t)` has the given value: the inverse of `log_snr` (Eq. 1)."""

    @abstractmethod
    def alpha(self, t: Time) -> Time:
        """The signal's coefficient."""

    @abstractmethod
    def sigma(self, t: Time) -> Time:
        """The noise's coefficient."""

    @abstractmethod
    def x0_from_v(self, x_t: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
        """x0 from the family's velocity."""

    @abstractmethod
    def v_from_x0(self, x_t: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
        """The family's velocity from x0. Undefined (infinite) at sigma = 0."""

    def _alpha_sigma(self, t: float | Tensor, samples: Tensor) -> tuple[float | Tensor, float | Tensor]:
        if isinstance(t, Tensor):
            return broadcast_to_samples(self.alpha(t), samples), broadcast_to_samples(self.sigma(t), samples)
        return self.alpha(t), self.sigma(t)

    def add_noise(self, x0: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
        """`alpha x0 + sigma eps`."""
        x0, eps = to_compute_dtype(x0, eps)
        alpha, sigma = self._alpha_sigma(t, x0)
        return alpha * x0 + sigma * eps

    def x0_from_eps(self, x_t: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
        """`(x_t - sigma eps) / alpha`. Not finite at alpha = 0, where noise says nothing about x0."""
        x_t, eps = to_compute_dtype(x_t, eps)
        alpha, sigma = self._alpha_sigma(t, x_t)
        return (x_t - sigma * eps) / alpha

    def eps_from_x0(self, x_t: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
        """`(x_t - alpha x0) / sigma`. Not finite at sigma = 0."""
        x_t, x0 = to_compute_dtype(x_t, x0)
        alpha, sigma = self._alpha_sigma(t, x_t)
        return (x_t - alpha * x0) / sigma


class RectifiedFlow(NoiseSchedule):
    """`x_t = (1 - t) x0 + t eps`, velocity `v = eps - x0` (SD3.5, Wan2.1, the embedded models)."""

    def alpha(self, t: Time) -> Time:
        """`1 - t`."""
        return _apply(t, lambda s: 1 - s)

    def sigma(self, t: Time) -> Time:
        """`t`."""
        return _apply(t, lambda s: s)

    def log_snr(self, t: Time) -> Time:
        """`2 ln((1 - t) / t)`: minus infinity at 1, plus infinity at 0."""
        return _apply(t, lambda s: 2 * torch.log((1 - s) / s))

    def time_from_log_snr(self, log_snr: Time) -> Time:
        """`1 / (1 + exp(logSNR / 2))` (Eq. 1)."""
        return _apply(log_snr, lambda l: torch.sigmoid(-l / 2))  # noqa: E741

    def x0_from_v(self, x_t: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
        """`x_t - t v`."""
        x_t, v = to_compute_dtype(x_t, v)
        _, sigma = self._alpha_sigma(t, x_t)
        return x_t - sigma * v

    def v_from_x0(self, x_t: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
        """`(x_t - x0) / t`, which equals `eps - x0`."""
        x_t, x0 = to_compute_dtype(x_t, x0)
        _, sigma = self._alpha_sigma(t, x_t)
        return (x_t - x0) / sigma


class VariancePreserving(NoiseSchedule):
    """`alpha^2 + sigma^2 = 1` by a table of `alphas_cumprod` (SDXL, PixArt).

    Continuous time is interpolated in logSNR between the table's entries; entry `i` stands at `t = i / 1000`, and
    everything from `t = 0.999` to 1 is the last entry. Velocity means v-prediction: `v = alpha eps - sigma x0`.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        """Take the 1000 entries of a scheduler's `alphas_cumprod`, strictly decreasing inside (0, 1).

        Raises:
            ValueError: another number of entries, or values that do not decrease.
        """
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
        if table.shape != (NUM_TRAIN_TIMESTEPS,):
            raise ValueError(f"alphas_cumprod must have {NUM_TRAIN_TIMESTEPS} entries, not shape {tuple(table.shape)}")
        if not (bool((table > 0).all()) and bool((table < 1).all()) and bool((table.diff() < 0).all())):
            raise ValueError("alphas_cumprod must decrease strictly and stay between 0 and 1")
        self._log_snr_table = torch.logit(table)
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012) -> VariancePreserving:
        """Betas linear in their square roots (SDXL's defaults), in float32 as the diffusers schedulers hold them."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float32) ** 2
        return cls(torch.cumprod(1.0 - betas, dim=0))

    @classmethod
    def linear(cls, beta_start: float = 0.0001, beta_end: float = 0.02) -> VariancePreserving:
        """Linear betas (PixArt's defaults), in float32 as the diffusers schedulers hold them."""
        betas = torch.linspace(beta_start, beta_end, NUM_TRAIN_TIMESTEPS, dtype=torch.float32)
        return cls(torch.cumprod(1.0 - betas, dim=0))

    def _table_on(self, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return self._log_snr_table
        if device not in self._tables:
            self._tables[device] = self._log_snr_table.to(device)
        return self._tables[device]

    def _interpolate(self, t: Tensor) -> Tensor:
        table = self._table_on(t.device)
        index = (t * NUM_TRAIN_TIMESTEPS).clamp(0, NUM_TRAIN_TIMESTEPS - 1)
        # 0.75 * 1000 and its like must hit the entry itself, not a neighbour blended in by a rounding error.
        index = torch.where((index - index.round()).abs() < 1e-9, index.round(), index)
        low = index.floor().long().clamp(max=NUM_TRAIN_TIMESTEPS - 2)
        return torch.lerp(table[low], table[low + 1], index - low)

    def _invert(self, log_snr: Tensor) -> Tensor:
        descending = self._table_on(log_snr.device)
        ascending = -descending
        wanted = -log_snr
        high = torch.searchsorted(ascending, wanted.contiguous()).clamp(1, NUM_TRAIN_TIMESTEPS - 1)
        low = high - 1
        fraction = ((wanted - ascending[low]) / (ascending[high] - ascending[low])).clamp(0, 1)
        time = (low + fraction) / NUM_TRAIN_TIMESTEPS
        # Noisier than the table's last entry is pure noise.
        return torch.where(log_snr < descending[-1], torch.ones_like(time), time)

    def log_snr(self, t: Time) -> Time:
        """The table's `ln(alphas_cumprod / (1 - alphas_cumprod))`, interpolated; always finite."""
        return _apply(t, self._interpolate)

    def time_from_log_snr(self, log_snr: Time) -> Time:
        """Inverse lookup: 0 above the table's first entry, 1 below its last."""
        return _apply(log_snr, self._invert)

    def alpha(self, t: Time) -> Time:
        """`sqrt(alphas_cumprod)`."""
        return _apply(t, lambda s: torch.sigmoid(self._interpolate(s)).sqrt())

    def sigma(self, t: Time) -> Time:
        """`sqrt(1 - alphas_cumprod)`."""
        return _apply(t, lambda s: torch.sigmoid(-self._interpolate(s)).sqrt())

    def x0_from_v(self, x_t: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
        """`alpha x_t - sigma v`."""
        x_t, v = to_compute_dtype(x_t, v)
        alpha, sigma = self._alpha_sigma(t, x_t)
        return alpha * x_t - sigma * v

    def v_from_x0(self, x_t: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
        """`(alpha x_t - x0) / sigma`, which equals `alpha eps - sigma x0`."""
        x_t, x0 = to_compute_dtype(x_t, x0)
        alpha, sigma = self._alpha_sigma(t, x_t)
        return (alpha * x_t - x0) / sigma
