"""Trains the embedded autoencoder: sharp reconstructions, and latents that survive bilinear upsampling.

Loss of a batch x with latents z = E(x):

    R(D(z), x) + w_z mean(z^2)  [ + w_u R(D(U(z)), U(x))  on half-resolution batches ]

where R is L1 on pixels and on their horizontal and vertical differences, and U doubles bilinearly. The bracket asks the
decoder to read an upsampled latent as the upsampled picture, which is what a cascade's stage change does to it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rmd.backbones.autoencoder import EmbeddedAutoencoder
from training.embedded.data.dataset import PictureSet
from training.runtime.files import load_tensors, save_model, save_tensors, write_json
from training.runtime.precision import native_autocast

Log = Callable[[str], None]


@dataclass(frozen=True)
class AutoencoderConfig:
    """Budget and hyper-parameters.

    Attributes:
        minutes: wall-clock budget, all runs together.
        batch: pictures a step at ``side``; steps at half of it take twice as many.
        side: pixels a side in training. Convolutions carry over: trained at 128 and 64, the shipped one is at its best
            at 256.
        learning_rate: AdamW's, after warm-up; falls linearly from ``cooldown_start`` of the budget on.
        latent_penalty: weight w_z.
        upsampling_weight: weight w_u of the scale-equivariance term.
    """

    minutes: float = 10.0
    batch: int = 32
    side: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    cooldown_start: float = 0.3
    latent_penalty: float = 1e-3
    upsampling_weight: float = 0.5
    ema_decay: float = 0.998
    seed: int = 0
    threads: int | None = None
    save_every_minutes: float = 2.0


def upsample_twice(x: Tensor) -> Tensor:
    """Bilinear 2x, the cascade's own U."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def reconstruction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean L1 of pixels plus mean L1 of horizontal and vertical neighbour differences."""
    error = prediction - target
    return (
        error.abs().mean()
        + (error[..., 1:] - error[..., :-1]).abs().mean()
        + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    )


def psnr(prediction: Tensor, target: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, for values in [-1, 1]."""
    squared = ((prediction.clamp(-1, 1) - target) / 2).pow(2).mean((1, 2, 3)).clamp_min(1e-8)
    return float((-10 * torch.log10(squared)).mean())


def flatten_pictures(rgba: Tensor, generator: torch.Generator | None, size: int, coloured_share: float = 0.5) -> Tensor:
    """(B, S, S, 4) uint8 -> (B, 3, size, size) in [-1, 1] over white, or over random colours for a share."""
    pixels = rgba.float() / 255
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    ground = torch.ones(len(rgba), 1, 1, 3)
    if generator is not None:
        coloured = torch.rand(len(rgba), generator=generator) < coloured_share
        ground[coloured] = torch.rand(int(coloured.sum()), 1, 1, 3, generator=generator)
    flat = (colour * alpha + ground * (1 - alpha)).permute(0, 3, 1, 2) * 2 - 1
    if flat.shape[-1] != size:
        flat = F.avg_pool2d(flat, flat.shape[-1] // size)
    return flat.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def measure(model: EmbeddedAutoencoder, pictures: Tensor) -> dict[str, float]:
    """PSNR in dB on pictures over white, (N, S, S, 4) uint8: at full and half resolution, and after U.

    ``upsampled``: D(U(E(half))) against U(half), the figure that the cascade needs to be 22 or more.
    """
    full = flatten_pictures(pictures, None, pictures.shape[1])
    half = F.avg_pool2d(full, 2)
    with native_autocast("cpu"):
        latents_full, latents_half = model.encode(full).float(), model.encode(half).float()
        return {
            "full": psnr(model.decode(latents_full).float(), full),
            "half": psnr(model.decode(latents_half).float(), half),
            "upsampled": psnr(model.decode(upsample_twice(latents_half)).float(), upsample_twice(half)),
            "pixel_upsampled_against_full": psnr(upsample_twice(half), full),
        }


@torch.no_grad()
def measure_latent_statistics(model: EmbeddedAutoencoder, batches: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of the raw latents over all ``batches`` (pictures in [-1, 1])."""
    with native_autocast("cpu"):
        raw = [model.encoder(batch).float().transpose(0, 1).flatten(1) for batch in batches]
    values = torch.cat(raw, 1)
    return values.mean(1).tolist(), values.std(1).tolist()


def train_autoencoder(
    pictures: PictureSet,
    folder: Path,
    config: AutoencoderConfig | None = None,
    *,
    model: EmbeddedAutoencoder | None = None,
    log: Log = print,
) -> EmbeddedAutoencoder:
    """Trains until the budget is spent and writes the averaged model into ``folder/model``.

    A run killed on the way resumes from its last state (``folder/state``), the minutes already spent counted.

    Returns:
        The averaged model with its latent statistics in the config, float32.
    """
    config = config or AutoencoderConfig()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    network: EmbeddedAutoencoder = (model or EmbeddedAutoencoder()).train()
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=1e-3)
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    state_folder = folder / "state"
    step, spent = 0, 0.0
    if (state_folder / "progress.json").is_file():
        progress = json.loads((state_folder / "progress.json").read_text())
        step, spent = progress["step"], progress["seconds"]
        tensors = load_tensors(state_folder / progress["tensors"])
        network.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        average = {k[4:]: v.clone() for k, v in tensors.items() if k.startswith("ema.")}
        for i, parameter in enumerate(network.parameters()):
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"adam.{i}.exp_avg"].clone(),
                "exp_avg_sq": tensors[f"adam.{i}.exp_avg_sq"].clone(),
            }
        log(f"autoencoder: resuming at step {step}, {spent / 60:.1f} minutes spent")

    train = np.asarray(pictures.indices("train"))
    held = pictures.indices("unseen_pair", "unseen_concept") or pictures.indices("train")
    pixels = torch.from_numpy(np.array(pictures.rgba))
    rng = np.random.default_rng((config.seed, step))
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    full_size = min(config.side, pixels.shape[1])
    budget, start, saved = config.minutes * 60, time.monotonic() - spent, time.monotonic()

    def save_state(seconds: float) -> None:
        tensors = {f"model.{k}": v for k, v in network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in average.items()}
        for i, parameter in enumerate(network.parameters()):
            moments = optimizer.state.get(parameter, {})
            tensors[f"adam.{i}.exp_avg"] = moments.get("exp_avg", torch.zeros_like(parameter))
            tensors[f"adam.{i}.exp_avg_sq"] = moments.get("exp_avg_sq", torch.zeros_like(parameter))
        name = f"step-{step}.safetensors"
        save_tensors(tensors, state_folder / name)
        write_json(state_folder / "progress.json", {"step": step, "seconds": seconds, "tensors": name})
        for old in state_folder.glob("step-*.safetensors"):
            if old.name != name:
                old.unlink()

    while (elapsed := time.monotonic() - start) < budget:
        fraction = elapsed / budget
        decay = max(0.02, 1 - max(0.0, fraction - config.cooldown_start) / (1 - config.cooldown_start))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps) * decay
        low = step % 3 == 2
        count = config.batch * (2 if low else 1)
        batch = flatten_pictures(pixels[rng.choice(train, count)], generator, full_size // 2 if low else full_size)
        with native_autocast("cpu"):
            latents = network.encoder(batch)
            output = network.decoder(latents)
        loss = reconstruction_loss(output.float(), batch)
        loss = loss + config.latent_penalty * latents.float().pow(2).mean()
        if low:
            with native_autocast("cpu"):
                output = network.decoder(upsample_twice(latents))
            loss = loss + config.upsampling_weight * reconstruction_loss(output.float(), upsample_twice(batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0))
        if math.isfinite(norm):  # a single bad batch must not cost the run
            optimizer.step()
        step += 1
        ema = min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in network.state_dict().items():
                average[name].lerp_(value, 1 - ema)
        if step % 100 == 0:
            value = float(loss.detach())
            log(f"autoencoder: {elapsed / 60:.1f} min, step {step}, loss {value:.4f}, gradient norm {norm:.2f}")
        if time.monotonic() - saved > config.save_every_minutes * 60:
            save_state(time.monotonic() - start)
            saved = time.monotonic()

    save_state(time.monotonic() - start)
    network.load_state_dict(average)
    network.eval()
    samples = [
        flatten_pictures(pixels[rng.choice(train, min(512, 4 * len(train)))], generator, size)
        for size in (full_size, full_size, full_size, full_size // 2)
    ]
    mean, std = measure_latent_statistics(network, samples)
    network.register_to_config(latents_mean=mean, latents_std=std)
    figures = measure(network, pixels[held[:512]])
    log("autoencoder, held-out PSNR in dB: " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items()))
    save_model(network, folder / "model")
    write_json(folder / "metrics.json", {"psnr": figures, "steps": step, "minutes": config.minutes})
    return network
