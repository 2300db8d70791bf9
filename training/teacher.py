"""Trains the embedded teacher: an ``SD3Transformer2DModel`` on cached latents, low resolution first, then both.

Rectified flow: ``x_t = (1 - t) x0 + t eps``, the network predicts ``v = eps - x0``. The curriculum (low resolution
first and long) is the one that, in large models, makes the gap between resolutions that RMD closes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmd.dtypes import native_dtype
from rmd.machine import device_name
from training.attention import training_attention
from training.interrupts import stopped_by_signals
from training.latents import TeacherData
from training.networks import compile_blocks

STATE_FILE = "state.safetensors"
TRANSFORMER_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 8,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 384,
    "caption_projection_dim": 256,
    "pooled_projection_dim": 384,
    "pos_embed_max_size": 16,
}
"""18.7 M parameters, half of them the modulations."""


class TeacherSettings(BaseModel):
    """What decides a teacher run; stored beside its state, so that a resumed run is the same run."""

    model_config = ConfigDict(extra="forbid")

    minutes: float = Field(60.0, gt=0, description="wall-clock budget; a resumed run counts the time already spent")
    low_share: float = Field(0.5, ge=0, lt=1, description="share of the budget spent on the low resolution alone")
    cooldown_share: float = Field(0.3, gt=0, le=1, description="last share of the budget, linear decay of the rates")
    batch: int = Field(32, ge=1, description="pictures a batch at the full size")
    low_batch: int = Field(128, ge=1, description="pictures a batch at the low size")
    low_every: int = Field(3, ge=2, description="after the low phase, every n-th batch is at the low size")
    full_time_shift: float = Field(
        2.0,
        ge=1,
        description="shift of the times towards noise at the full size; the ratio of the sides is neutral",
    )
    muon_rate: float = Field(1.5e-3, gt=0)
    adam_rate: float = Field(6e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(100, ge=1)
    drop_text: float = Field(0.1, ge=0, le=1, description="share of samples trained on the empty prompt, for guidance")
    coloured: float = Field(0.25, ge=0, le=1, description="share of samples on a coloured ground")
    uniform_times: float = Field(0.15, ge=0, le=1, description="share of times drawn uniformly, the rest logit-normal")
    ema_decay: float = Field(0.9985, ge=0, lt=1)
    initial: Path | None = Field(None, description="a teacher's folder whose transformer the training starts from")
    save_minutes: float = Field(5.0, gt=0)
    compile: bool = Field(False, description="torch.compile the transformer's blocks")
    seed: int = 0


class TeacherTrainer:
    """The training loop and its state: float32 master weights, a working copy, EMA, two optimisers.

    The working copy is in the device's own dtype. Everything, the encoded set included, lies on ``device``.

    Matrices inside the blocks go to Muon; modulations, embeddings, biases and the output to AdamW (Muon gains little
    on modulations and costs most there).
    """

    def __init__(
        self,
        settings: TeacherSettings,
        data: TeacherData,
        run: Path,
        transformer_config: dict[str, Any] = TRANSFORMER_CONFIG,
        on_save: Callable[[TeacherTrainer], None] = lambda _trainer: None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings, self.run, self.on_save = settings, run, on_save
        self.device = torch.device(device)
        self.data = data.to(self.device)
        self.config = dict(transformer_config)
        torch.manual_seed(settings.seed)
        model = initial_transformer(settings.initial, self.config).to(self.device)
        self.master = {name: nn.Parameter(p.detach().float().clone()) for name, p in model.named_parameters()}
        self.ema = {name: p.detach().clone() for name, p in self.master.items()}
        self.dtype = native_dtype(self.device)
        self.model = model.to(self.dtype)
        self.working = dict(self.model.named_parameters())
        if settings.compile:
            compile_blocks(self.model)
        muon = [p for name, p in self.master.items() if is_muon_matrix(name, p)]
        rest = [p for name, p in self.master.items() if not is_muon_matrix(name, p)]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.Muon(
                    muon,
                    lr=settings.muon_rate,
                    weight_decay=settings.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                ),
                settings.muon_rate,
            ),
            (torch.optim.AdamW(rest, lr=settings.adam_rate, betas=(0.9, 0.97), weight_decay=0.0), settings.adam_rate),
        ]
        self.random = torch.Generator(self.device).manual_seed(settings.seed)
        self.devices: list[str] = []
        self.step = self.samples = 0
        self.seconds = 0.0
        self._stop = False

    # ---- one step -----------------------------------------------------------------------------------------------

    def draw(self, low: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, 8, H, W) float32, text tokens and pooled text of a random batch."""
        s, data = self.settings, self.data
        size = s.low_batch if low else s.batch
        pictures, grounds, captions = data.captions_of.shape
        n = self._integers(pictures, size)
        tinted = self._uniform(size) < s.coloured
        g = torch.where(tinted, self._integers(max(grounds, 2), size, low=1), 0).clamp(max=grounds - 1)
        rows = data.captions_of[n, g, self._integers(captions, size)]
        rows = torch.where(self._uniform(size) < s.drop_text, 0, rows)
        latents = (data.low if low else data.high)[n, g].float()
        return latents, data.tokens[rows].to(self.dtype), data.pooled[rows].to(self.dtype)

    def times(self, size: int, low: bool) -> Tensor:
        """(B,) times: logit-normal(0, 1), a share of them uniform so that both ends are seen.

        At the full size they are shifted, ``s t / (1 + (s - 1) t)``: of more pixels more can be told at the same time
        (arXiv 2403.03206, section 5.3.2).
        """
        logit_normal = torch.sigmoid(self._normal((size,)))
        uniform = self._uniform(size)
        t = torch.where(self._uniform(size) < self.settings.uniform_times, uniform, logit_normal)
        shift = 1.0 if low else self.settings.full_time_shift
        return shift * t / (1 + (shift - 1) * t)

    def _integers(self, high: int, count: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, (count,), generator=self.random, device=self.device)

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.random, device=self.device)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.random, device=self.device)

    def train_step(self, low: bool) -> tuple[float, float]:
        """One update; returns the loss and the gradient's norm before clipping at 1."""
        x0, tokens, pooled = self.draw(low)
        t = self.times(len(x0), low)
        loss = velocity_loss(self.model, x0, self._normal(tuple(x0.shape)), t, tokens, pooled)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, p in self.working.items():
            self.master[name].grad = None if p.grad is None else p.grad.float()
            p.grad = None
        norm = nn.utils.clip_grad_norm_(self.master.values(), 1.0)
        if torch.isfinite(norm):
            self._update()
        self.step += 1
        self.samples += len(x0)
        return loss.item(), norm.item()

    def _update(self) -> None:
        factor = self.rate_factor()
        for optimizer, rate in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            names = list(self.master)
            masters = [self.master[name].data for name in names]
            torch._foreach_lerp_([self.ema[name] for name in names], masters, 1 - decay)
            torch._foreach_copy_([self.working[name].data for name in names], masters)

    def rate_factor(self) -> float:
        """Linear warm-up by steps, constant, then linear cool-down by time."""
        s = self.settings
        left = 1 - self.seconds / (60 * s.minutes)
        return min(1.0, (self.step + 1) / s.warmup_steps, max(left, 0.0) / s.cooldown_share)

    @property
    def finished(self) -> bool:
        """Whether the time budget is spent."""
        return self.seconds >= 60 * self.settings.minutes

    @property
    def in_low_phase(self) -> bool:
        """Whether only the low resolution is trained as yet."""
        return self.seconds < 60 * self.settings.minutes * self.settings.low_share

    # ---- the run ------------------------------------------------------------------------------------------------

    def train(self, log: Callable[[dict[str, float]], None]) -> None:
        """Trains until the budget is spent or SIGTERM/SIGINT arrives; saves either way."""
        if (name := device_name(self.device)) not in self.devices and not self.finished:
            self.devices.append(name)
        last_save = time.monotonic()
        window: list[float] = []
        with stopped_by_signals(self.stop):
            while not self._stop and not self.finished:
                started = time.monotonic()
                low = self.in_low_phase or self.step % self.settings.low_every == 0
                loss, norm = self.train_step(low)
                self.seconds += time.monotonic() - started
                if not math.isfinite(loss):
                    raise ValueError(f"the loss is {loss} at step {self.step}: lower --muon-rate or --adam-rate")
                window.append(loss)
                if self.step % 25 == 0:
                    log(
                        {
                            "step": self.step,
                            "minutes": round(self.seconds / 60, 2),
                            "samples": self.samples,
                            "samples_per_second": round(self.samples / self.seconds, 1),
                            "loss": round(sum(window) / len(window), 4),
                            "gradient_norm": round(norm, 3),
                            "rate_factor": round(self.rate_factor(), 3),
                            "low_phase": float(self.in_low_phase),
                        }
                    )
                    window = []
                if time.monotonic() - last_save > 60 * self.settings.save_minutes:
                    self.save()
                    self.on_save(self)
                    last_save = time.monotonic()
            self.save()
            self.on_save(self)

    def stop(self) -> None:
        """Ask the loop to save and return after the step it is in."""
        self._stop = True

    # ---- state --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes ``state.safetensors`` (weights, EMA, optimisers, random state; counters in its header) atomically."""
        tensors: dict[str, Tensor] = {f"master.{k}": v.detach() for k, v in self.master.items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for index, (optimizer, _) in enumerate(self.optimizers):
            for key, entry in optimizer.state_dict()["state"].items():
                tensors |= {
                    f"optimizer.{index}.{key}.{name}": torch.as_tensor(value).clone() for name, value in entry.items()
                }
        tensors["random"] = self.random.get_state().cpu()
        header = {
            "device": self.device.type,
            "devices": json.dumps(self.devices),
            "step": str(self.step),
            "samples": str(self.samples),
            "seconds": repr(self.seconds),
            "settings": self.settings.model_dump_json(),
            "transformer": json.dumps(self.config),
        }
        self.run.mkdir(parents=True, exist_ok=True)
        part = self.run / f"{STATE_FILE}.part"
        save_file(tensors, part, metadata=header)
        os.replace(part, self.run / STATE_FILE)

    def resume(self) -> bool:
        """Takes up the state in the run's folder, if there is one; the settings given now stay in force.

        On another kind of device than before, batches and noise are drawn anew.

        Returns:
            whether there was one.

        Raises:
            ValueError: it is of another transformer, or started from another teacher.
        """
        path = self.run / STATE_FILE
        if not path.exists():
            return False
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            header = file.metadata()
        if json.loads(header["transformer"]) != self.config:
            raise ValueError(f"{path} holds another transformer than the one configured: choose another --run folder")
        begun = json.loads(header["settings"]).get("initial")
        if begun != (None if self.settings.initial is None else str(self.settings.initial)):
            raise ValueError(
                f"{path} started from {begun or 'new weights'}, not from {self.settings.initial or 'new weights'}: "
                f"go on with {f'--initial {begun}' if begun else 'no --initial'}, or choose another --run folder"
            )
        tensors = load_file(path)
        with torch.no_grad():
            for name, p in self.master.items():
                p.copy_(tensors[f"master.{name}"])
                self.ema[name].copy_(tensors[f"ema.{name}"])
                self.working[name].copy_(p)
        for index, (optimizer, _) in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            prefix = f"optimizer.{index}."
            for name, value in tensors.items():
                if name.startswith(prefix):
                    key, field = name.removeprefix(prefix).split(".", 1)
                    state.setdefault(int(key), {})[field] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step, self.samples = int(header["step"]), int(header["samples"])
        self.devices = json.loads(header.get("devices", "[]"))
        if header.get("device", "cpu") == self.device.type:
            self.random.set_state(tensors["random"])
        else:  # generators of different devices have nothing in common
            self.random.manual_seed(self.settings.seed + 1_000_003 * self.step)
        self.seconds = float(header["seconds"])
        return True

    def ema_model(self) -> SD3Transformer2DModel:
        """A transformer with the averaged weights, in the device's dtype."""
        model = SD3Transformer2DModel(**self.config)
        model.load_state_dict(self.ema, strict=False)  # buffers (position table) are not trained
        return model.to(self.dtype).eval()


def velocity_loss(model: Any, x0: Tensor, eps: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity ``eps - x0`` at ``x_t = (1 - t) x0 + t eps``; a scalar.

    Args:
        x0, eps: (B, C, H, W) float32 latents and noise.
        t: (B,) times in [0, 1].
        tokens, pooled: (B, L, D) and (B, D) text, in the model's dtype.
    """
    w = t[:, None, None, None]
    patches = x0.shape[-1] * x0.shape[-2] // model.config.patch_size**2
    with training_attention(x0.device.type, tokens.shape[1] + patches):
        velocity = model(
            hidden_states=((1 - w) * x0 + w * eps).to(tokens.dtype),
            timestep=t * 1000,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    loss: Tensor = (velocity.float() - (eps - x0)).square().mean()
    return loss


@torch.no_grad()
def picture_loss(model: Any, data: TeacherData, batch: int = 128, seed: int = 0) -> float:
    """The velocity loss on the white pictures of a set at the full size, with their plain captions.

    The same noise and evenly spread times on every call, so that two states of a training compare. The model is in the
    device's dtype.
    """
    device = data.high.device
    dtype = native_dtype(device)
    random = torch.Generator().manual_seed(seed)
    count = len(data.high)
    times = ((torch.arange(count) + 0.5) / count)[torch.randperm(count, generator=random)].to(device)
    total = 0.0
    for rows in torch.split(torch.arange(count), batch):
        x0 = data.high[rows, 0].float()
        eps = torch.randn(x0.shape, generator=random).to(device)
        captions = data.captions_of[rows, 0, 0]
        text = data.tokens[captions].to(dtype), data.pooled[captions].to(dtype)
        loss = velocity_loss(model, x0, eps, times[rows], *text)
        total += loss.item() * len(rows)
    return total / count


def initial_transformer(folder: Path | None, config: dict[str, Any]) -> SD3Transformer2DModel:
    """A new transformer, or the one of the teacher in ``folder``, float32.

    Raises:
        ValueError: the folder's transformer has another configuration.
    """
    if folder is None:
        return SD3Transformer2DModel(**config)
    model = SD3Transformer2DModel.from_pretrained(str(folder), subfolder="transformer", use_safetensors=True)
    if other := {name for name, value in config.items() if model.config[name] != value}:
        raise ValueError(f"--initial: the transformer in {folder} differs from the one configured in {sorted(other)}")
    return model.float()


def is_muon_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains this parameter: the attention and feed-forward matrices of the blocks."""
    return parameter.ndim == 2 and name.startswith("transformer_blocks.") and ".norm" not in name
