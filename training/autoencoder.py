"""Trains the embedded autoencoder on the training pictures at both resolutions.

Loss: L1 and L1 of the image gradients, a small penalty on the latents, and a scale-equivariance term
``|D(U(E(x))) - U(x)|`` (U = bilinear 2x) so that the cascade may upsample latents.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from rmd.backbones.autoencoder import EmbeddedAutoencoder


class AutoencoderSettings(BaseModel):
    """What decides an autoencoder run."""

    model_config = ConfigDict(extra="forbid")

    minutes: float = Field(12.0, gt=0)
    batch: int = Field(32, ge=1, description="pictures a batch at the full size; twice as many at the half size")
    rate: float = Field(2e-3, gt=0, description="AdamW's peak; linear decay over the last 70 % of the time")
    latent_penalty: float = Field(1e-3, ge=0)
    equivariance: float = Field(0.5, ge=0)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    seed: int = 0


@dataclass(frozen=True)
class AutoencoderQuality:
    """Held-out PSNR in dB: of reconstructions at both sizes, and of decoded 2x upsampled half-size latents."""

    full: float
    half: float
    upsampled_against_half: float
    upsampled_against_full: float


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 of the pixels plus L1 of their horizontal and vertical differences; (B, 3, H, W) each."""
    error = decoded - pixels
    return error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def upsample_twice(x: Tensor) -> Tensor:
    """The cascade's U at ratio 2."""
    return F.interpolate(x, scale_factor=2, mode="bilinear")


def psnr(decoded: Tensor, pixels: Tensor) -> float:
    """Mean over pictures of the PSNR in dB, for values in [-1, 1]."""
    error = ((decoded - pixels) / 2).square().mean((1, 2, 3)).clamp_min(1e-8)
    return float((-10 * error.log10()).mean())


class AutoencoderTrainer:
    """The loop: two batches at the full size, one at the half size with the scale-equivariance term.

    Args:
        train: (N, S, S, 4) uint8 RGBA training pictures.
        held_out: the same, for PSNR only.
    """

    def __init__(self, settings: AutoencoderSettings, train: Tensor, held_out: Tensor) -> None:
        self.settings, self.train_rgba, self.held_out = settings, train, held_out
        torch.manual_seed(settings.seed)
        self.random = torch.Generator().manual_seed(settings.seed)
        self.model = EmbeddedAutoencoder().to(memory_format=torch.channels_last)
        self.ema = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=1e-3
        )
        self.step = 0

    def pixels(self, rgba: Tensor, half: bool, tinted: bool = True) -> Tensor:
        """Composites on white, or half of the time on a random colour; (B, 3, S, S) in [-1, 1]."""
        part = rgba.float() / 255
        ground = torch.ones(len(part), 1, 1, 3)
        if tinted:
            chosen = torch.rand(len(part), generator=self.random) < 0.5
            ground[chosen] = torch.rand(int(chosen.sum()), 1, 1, 3, generator=self.random)
        alpha = part[..., 3:]
        pixels = (part[..., :3] * alpha + ground * (1 - alpha)).permute(0, 3, 1, 2) * 2 - 1
        return (F.avg_pool2d(pixels, 2) if half else pixels).contiguous(memory_format=torch.channels_last)

    def train_step(self, rate: float) -> float:
        """One update at the given rate; returns the loss."""
        s = self.settings
        half = self.step % 3 == 2
        rows = torch.randint(len(self.train_rgba), (s.batch * (2 if half else 1),), generator=self.random)
        x = self.pixels(self.train_rgba[rows], half)
        with torch.autocast("cpu", torch.bfloat16):
            z = self.model.encoder(x)
            decoded = self.model.decoder(z)
            upsampled = self.model.decoder(upsample_twice(z)) if half else None
        loss = reconstruction_loss(decoded.float(), x) + s.latent_penalty * z.float().square().mean()
        if upsampled is not None:
            loss = loss + s.equivariance * reconstruction_loss(upsampled.float(), upsample_twice(x))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(s.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.ema[name].lerp_(value, 1 - decay)
        return loss.item()

    def train(self, log: Callable[[dict[str, float]], None]) -> EmbeddedAutoencoder:
        """Trains for the time set and returns the averaged model with its latent statistics."""
        s = self.settings
        started = time.monotonic()
        while (share := (time.monotonic() - started) / (60 * s.minutes)) < 1:
            rate = s.rate * min(1.0, (self.step + 1) / 100, max(0.03, (1 - share) / 0.7))
            loss = self.train_step(rate)
            if self.step % 50 == 0:
                log({"step": self.step, "minutes": round(share * s.minutes, 2), "loss": round(loss, 4)})
        return self.finished()

    def finished(self) -> EmbeddedAutoencoder:
        """The averaged model; its latents have mean 0 and standard deviation 1 a channel over both resolutions."""
        model = EmbeddedAutoencoder()
        model.load_state_dict(self.ema)
        model.eval().to(memory_format=torch.channels_last)
        rows = torch.randperm(len(self.train_rgba), generator=self.random)[:512]
        parts = []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for half in (False, False, False, True):
                z = model.encoder(self.pixels(self.train_rgba[rows], half)).float()
                parts.append(z.transpose(0, 1).flatten(1))
        flat = torch.cat(parts, 1)
        model.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())
        return model

    @torch.inference_mode()
    def quality(self, model: EmbeddedAutoencoder, pictures: int = 256) -> AutoencoderQuality:
        """PSNR on held-out pictures on white."""
        rgba = self.held_out[:pictures]
        full, half = self.pixels(rgba, half=False, tinted=False), self.pixels(rgba, half=True, tinted=False)
        with torch.autocast("cpu", torch.bfloat16):
            again, half_again = model.decode(model.encode(full)).float(), model.decode(model.encode(half)).float()
            upsampled = model.decode(upsample_twice(model.encode(half).float())).float()
        return AutoencoderQuality(
            full=psnr(again, full),
            half=psnr(half_again, half),
            upsampled_against_half=psnr(upsampled, upsample_twice(half)),
            upsampled_against_full=psnr(upsampled, full),
        )
