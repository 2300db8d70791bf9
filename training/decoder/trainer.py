"""The loop that distils a decoder: latents in, the full decoder's pictures as targets, resumable to the bit.

    loss = w_p R(d(z), D(z)) + w_f |f(d(z)) - f(D(z))|^2 - w_a a(d(z))

D is the full decoder, d the small one, R L1 on pixels and on their differences, f features of a trained network, a the
score of a discriminator that learns to tell D's pictures from d's. No picture of any data set is needed. z is a sample
of the student's, or a noised neighbour of one: d is also asked about latents that are slightly off, as those of another
checkpoint, of a preview or in another dtype are.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmd.backbones.base import weights_dtype
from rmd.backbones.decoders import small_decoder_config
from rmd.backbones.tiny_decoder import TinyDecoder
from rmd.machine import device_name
from rmd.size import Size
from training.decoder.losses import PatchDiscriminator, discriminator_loss, perceptual_loss
from training.decoder.settings import HOUSEKEEPING, DecoderSettings
from training.distill.optimizer import AveragedWeights, MasterAdamW
from training.embedded.autoencoder import reconstruction_loss
from training.evaluate.shared.features import EfficientNetLite0
from training.runtime.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from training.runtime.interrupts import stopped_by_signals
from training.runtime.metrics import append_line, cut_lines
from training.runtime.precision import native_autocast
from training.runtime.randomness import Randomness

_BETAS = (0.9, 0.98)


@dataclass
class Progress:
    """How far a run is."""

    iteration: int = 0
    seconds: float = 0.0
    pictures: int = 0
    devices: list[str] = field(default_factory=list)


class DecoderTrainer:
    """Trains one small decoder in one run folder (`metrics.jsonl`, `checkpoints/step-*`).

    Args:
        settings: of the run.
        teacher: the full decoder, latents to pictures in about [-1, 1].
        latents: by size, (N, C, H, W) of the denoiser's own scale.
        compression: pixels a latent position, along one side.
        identity: of the full decoder and the latents; a run of others is not gone on with.
        run: the folder.
        features: network of the perceptual term; needed where that has a weight.
        device: where everything runs.
    """

    def __init__(
        self,
        settings: DecoderSettings,
        teacher: nn.Module,
        latents: Mapping[Size, Tensor],
        *,
        compression: int,
        identity: Mapping[str, Any],
        run: Path,
        features: EfficientNetLite0 | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        from diffusers import AutoencoderTiny

        if settings.perceptual and features is None:
            raise ValueError("the perceptual term needs the feature network")
        self.settings, self.run, self.identity = settings, run, dict(identity)
        self.device = torch.device(device)
        # A copy: channels last halves its time on a CPU, and who measures it later wants it as it is served.
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.features = None if features is None else features.requires_grad_(False)
        self.latents = dict(latents)
        self.sizes = sorted(self.latents)
        channels = self.latents[self.sizes[-1]].shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.autoencoder = AutoencoderTiny(
                **small_decoder_config(channels, compression, settings.blocks, settings.width)
            )
            self.discriminator = PatchDiscriminator() if settings.adversarial else None
        self.network = TinyDecoder(self.autoencoder).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network.train()
        self.optimizer = MasterAdamW(dict(self.network.named_parameters()), settings.rate, _BETAS)
        self.ema = AveragedWeights(self.optimizer.master_state(), settings.ema_decay)
        self.critic: MasterAdamW | None = None
        if self.discriminator is not None:
            self.discriminator.to(self.device).train()
            self.critic = MasterAdamW(dict(self.discriminator.named_parameters()), settings.rate, (0.0, 0.95))
        self.random = Randomness(settings.seed, self.device)
        self.progress = Progress()
        self._stop = False

    # ---- one update -----------------------------------------------------------------------------------------------

    def draw(self) -> Tensor:
        """Latents of one batch, (B, C, h, w) float32."""
        s, random = self.settings, self.random
        lower = self.sizes[:-1]
        low = bool(lower) and float(random.uniform(1)) < s.low_share
        size = lower[int(random.integers(len(lower), 1))] if low else self.sizes[-1]
        stored = self.latents[size]
        z = stored[random.integers(len(stored), s.batch)].to(self.device, torch.float32)
        side = min(s.crop or max(z.shape[2:]), *z.shape[2:])
        if side < max(z.shape[2:]):
            top, left = (int(random.integers(length - side + 1, 1)) for length in z.shape[2:])
            z = z[..., top : top + side, left : left + side]
        spread = random.uniform(s.batch).float() * s.noise
        spread = torch.where(random.uniform(s.batch) < s.noised_share, spread, torch.zeros_like(spread))
        z = z + spread.view(-1, 1, 1, 1) * random.normal(z.shape)
        return z.contiguous(memory_format=torch.channels_last)

    def update(self) -> dict[str, float]:
        """One update; returns figures to log."""
        s = self.settings
        z = self.draw()
        with torch.no_grad():
            # As a picture is shown: what is beyond white is white.
            target = self.teacher(z.to(weights_dtype(self.teacher))).float().clamp(-1, 1)
        with native_autocast(self.device):
            drawn = self.network(z)
        drawn = drawn.float()
        figures: dict[str, float] = {}
        loss = torch.zeros((), device=self.device)

        def add(name: str, weight: float, value: Tensor) -> None:
            nonlocal loss
            loss = loss + weight * value
            figures[name] = float(value.detach())

        if s.pixel:
            add("pixel", s.pixel, reconstruction_loss(drawn, target))
        if s.perceptual and self.features is not None and self.share_done() >= s.perceptual_from:
            with native_autocast(self.device):
                add("perceptual", s.perceptual, perceptual_loss(self.features, drawn, target))
        asked = self.discriminator is not None and self.share_done() >= s.adversarial_from
        if asked and self.discriminator is not None:
            # Its gradients of this pass are dropped when its own update begins.
            with native_autocast(self.device):
                score = self.discriminator(drawn).float()
            add("adversarial", s.adversarial, -score.mean())
        loss.backward()  # type: ignore[no-untyped-call]
        rate = s.rate * self.rate_factor()
        figures["loss"] = float(loss.detach())
        figures["gradient_norm"] = self.optimizer.step(rate)
        if asked and self.discriminator is not None and self.critic is not None:
            self.critic.zero_grad()
            with native_autocast(self.device):
                scores = self.discriminator(torch.cat([target, drawn.detach()])).float()
            opinion = discriminator_loss(*scores.chunk(2))
            opinion.backward()  # type: ignore[no-untyped-call]
            self.critic.step(rate)
            figures["discriminator"] = float(opinion.detach())
        self.ema.update(self.optimizer.master_state())
        self.progress.iteration += 1
        self.progress.pictures += s.batch
        if not math.isfinite(figures["loss"]):
            raise ValueError(f"the loss is {figures['loss']} at update {self.progress.iteration}: lower --rate")
        return figures

    def share_done(self) -> float:
        """The share of the run that is done, in [0, 1], by time or updates, whichever is further."""
        s, p = self.settings, self.progress
        shares = [p.iteration / max(s.iterations, 1) if s.iterations is not None else 0.0]
        shares.append(p.seconds / (60 * s.minutes) if s.minutes else float(s.minutes == 0))
        return min(1.0, max(shares))

    def rate_factor(self) -> float:
        """Linear warm-up by updates, constant, then linear to ``final_rate`` by the share that is done."""
        s = self.settings
        falling = min(1.0, (1 - self.share_done()) / s.cooldown_share)
        return min(1.0, (self.progress.iteration + 1) / s.warmup) * (s.final_rate + (1 - s.final_rate) * falling)

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        s, p = self.settings, self.progress
        return (s.iterations is not None and p.iteration >= s.iterations) or (
            s.minutes is not None and p.seconds >= 60 * s.minutes
        )

    # ---- the run --------------------------------------------------------------------------------------------------

    def train(self, on_update: Callable[[float, dict[str, float]], None] = lambda _share, _figures: None) -> None:
        """Trains until the budget is spent or SIGTERM/SIGINT arrives; saves either way.

        Args:
            on_update: told the share that is done and the last update's figures.
        """
        if (name := device_name(self.device)) not in self.progress.devices and not self.finished:
            self.progress.devices.append(name)
        self.run.mkdir(parents=True, exist_ok=True)
        cut_lines(self.run / "metrics.jsonl", self.progress.iteration)
        saved = time.monotonic()
        with stopped_by_signals(self.stop):
            while not self._stop and not self.finished:
                started = time.monotonic()
                figures = self.update()
                self.progress.seconds += time.monotonic() - started
                if self.progress.iteration % self.settings.log_every == 0:
                    self._record(figures)
                on_update(self.share_done(), figures)
                if time.monotonic() - saved > 60 * self.settings.save_minutes:
                    self.save()
                    saved = time.monotonic()
            self.save()

    def stop(self) -> None:
        """Ask the loop to save and return after the update it is in."""
        self._stop = True

    def _record(self, figures: Mapping[str, float]) -> None:
        progress = self.progress
        line = {
            "iteration": progress.iteration,
            "seconds": round(progress.seconds, 2),
            "rate_factor": round(self.rate_factor(), 4),
            **{name: float(f"{value:.6g}") for name, value in sorted(figures.items())},
        }
        append_line(self.run / "metrics.jsonl", line)

    # ---- state ----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint."""
        roles = {
            "decoder": self.optimizer.master_state(),
            "decoder_optimizer": self.optimizer.optimizer_state(),
            "ema": self.ema.weights,
            "random": self.random.state(),
        }
        if self.discriminator is not None and self.critic is not None:
            roles["discriminator"] = self.discriminator.state_dict()
            roles["discriminator_optimizer"] = self.critic.optimizer_state()
        state = {
            "seconds": self.progress.seconds,
            "pictures": self.progress.pictures,
            "devices": self.progress.devices,
            "ema_updates": self.ema.updates,
            "settings": self.settings.model_dump(mode="json"),
            "identity": self.identity,
        }
        roles = {name: tensors for name, tensors in roles.items() if tensors}  # an optimiser before its first update
        save_checkpoint(self.run / "checkpoints", self.progress.iteration, roles, state)

    def resume(self) -> bool:
        """Go on from the run's newest checkpoint, if there is one.

        Returns:
            whether there was one.

        Raises:
            ValueError: it is of other settings, latents or another full decoder.
        """
        found = checkpoints(self.run / "checkpoints")
        if not found:
            return False
        roles, state = load_checkpoint(found[-1])
        now = self.settings.model_dump(mode="json")
        changed = sorted(n for n in now if n not in HOUSEKEEPING and state["settings"].get(n) != now[n])
        if changed:
            raise ValueError(f"{self.run} was begun with other settings ({', '.join(changed)}): choose another --run")
        if state["identity"] != self.identity:
            raise ValueError(f"{self.run} was begun with another decoder or other latents: choose another --run")
        self.optimizer.load_master_state(roles["decoder"])
        self.optimizer.load_optimizer_state(roles.get("decoder_optimizer", {}))
        self.ema.weights = {name: roles["ema"][name].to(value) for name, value in self.ema.weights.items()}
        self.ema.updates = int(state["ema_updates"])
        self.random.load_state(roles["random"], int(state["iteration"]))
        if self.discriminator is not None and self.critic is not None:
            self.discriminator.load_state_dict(roles["discriminator"])
            self.critic.load_optimizer_state(roles.get("discriminator_optimizer", {}))
        self.progress = Progress(
            int(state["iteration"]), float(state["seconds"]), int(state["pictures"]), list(state["devices"])
        )
        return True

    def averaged(self) -> Any:
        """The autoencoder with the averaged decoder, float32, ready to be saved."""
        model = copy.deepcopy(self.autoencoder).to("cpu")
        # Names of TinyDecoder's weights are those of its network's; the encoder stays as it was drawn.
        model.load_state_dict({**model.state_dict(), **{n: w.cpu() for n, w in self.ema.weights.items()}})
        return model.eval()
