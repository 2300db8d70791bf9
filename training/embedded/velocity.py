"""The training loop of the embedded teachers: float32 master weights, a working copy, EMA, Muon and AdamW.

Rectified flow: ``x_t = (1 - t) x0 + t eps``, the network predicts ``v = eps - x0``.
"""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmd.dtypes import native_dtype
from rmd.machine import device_name
from training.distill.roles import compile_blocks
from training.runtime.attention import scoring_attention, training_attention
from training.runtime.interrupts import stopped_by_signals

STATE_FILE = "state.safetensors"
LOG_STEPS = 25


class VelocitySettings(BaseModel):
    """What every run of a teacher decides."""

    model_config = ConfigDict(extra="forbid")

    minutes: float = Field(60.0, gt=0, description="wall-clock budget; a resumed run counts the time already spent")
    cooldown_share: float = Field(0.3, gt=0, le=1, description="last share of the budget, linear decay of the rates")
    muon_rate: float = Field(1.5e-3, gt=0)
    adam_rate: float = Field(6e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(100, ge=1)
    drop_text: float = Field(0.1, ge=0, le=1, description="share of samples trained on the empty prompt, for guidance")
    uniform_times: float = Field(0.15, ge=0, le=1, description="share of times drawn uniformly, the rest logit-normal")
    ema_decay: float = Field(0.9985, ge=0, lt=1)
    initial: Path | None = Field(None, description="a teacher's folder whose transformer the training starts from")
    save_minutes: float = Field(5.0, gt=0)
    compile: bool = Field(False, description="torch.compile the transformer's blocks")
    seed: int = 0


S = TypeVar("S", bound=VelocitySettings)


@dataclass(frozen=True)
class Loss:
    """Of one batch.

    Attributes:
        value: a scalar with a graph.
        samples: in the batch.
        kind: what the batch was of; the log averages each kind alone, under ``loss_<kind>`` unless it is empty.
    """

    value: Tensor
    samples: int
    kind: str = ""


class VelocityTrainer(ABC, Generic[S]):
    """A teacher's training loop and its state.

    The working copy of the weights is in the device's own dtype.

    Matrices inside the blocks go to Muon; modulations, embeddings, biases and the output to AdamW (Muon gains little
    on modulations and costs most there).

    Args:
        settings: of the run.
        model: the network, float32, with the weights to start from.
        run: the folder of the state.
        config: the network's configuration; a state of another one is refused.
        on_save: called after each save.
        device: where everything lies.
    """

    def __init__(
        self,
        settings: S,
        model: Any,
        run: Path,
        config: dict[str, Any],
        on_save: Callable[[Any], None] = lambda _trainer: None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings, self.run, self.on_save = settings, run, on_save
        self.device = torch.device(device)
        self.config = dict(config)
        model = model.to(self.device)
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
        self.kinds: dict[str, int] = {}
        """Samples of each kind, where there are several."""
        self.seconds = 0.0
        self._stop = False

    # ---- what a teacher defines ---------------------------------------------------------------------------------

    @abstractmethod
    def next_loss(self) -> Loss:
        """The loss of the next batch."""

    @abstractmethod
    def ema_model(self) -> Any:
        """A network with the averaged weights, in the device's dtype."""

    def log_fields(self) -> dict[str, float]:
        """Further numbers for a line of the log."""
        return {}

    # ---- one step -----------------------------------------------------------------------------------------------

    def _integers(self, high: int, count: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, (count,), generator=self.random, device=self.device)

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.random, device=self.device)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.random, device=self.device)

    def update(self, loss: Loss) -> tuple[float, float]:
        """One update; returns the loss and the gradient's norm before clipping at 1."""
        loss.value.backward()  # type: ignore[no-untyped-call]
        for name, p in self.working.items():
            self.master[name].grad = None if p.grad is None else p.grad.float()
            p.grad = None
        norm = nn.utils.clip_grad_norm_(self.master.values(), 1.0)
        if torch.isfinite(norm):
            self._update()
        self.step += 1
        self.samples += loss.samples
        if loss.kind:
            self.kinds[loss.kind] = self.kinds.get(loss.kind, 0) + loss.samples
        return loss.value.item(), norm.item()

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

    # ---- the run ------------------------------------------------------------------------------------------------

    def train(self, log: Callable[[dict[str, float]], None]) -> None:
        """Trains until the budget is spent or SIGTERM/SIGINT arrives; saves either way."""
        if (name := device_name(self.device)) not in self.devices and not self.finished:
            self.devices.append(name)
        last_save = time.monotonic()
        window: dict[str, list[float]] = {}
        with stopped_by_signals(self.stop):
            while not self._stop and not self.finished:
                started = time.monotonic()
                batch = self.next_loss()
                loss, norm = self.update(batch)
                self.seconds += time.monotonic() - started
                if not math.isfinite(loss):
                    raise ValueError(f"the loss is {loss} at step {self.step}: lower --muon-rate or --adam-rate")
                window.setdefault(f"loss_{batch.kind}" if batch.kind else "loss", []).append(loss)
                if self.step % LOG_STEPS == 0:
                    log(
                        {
                            "step": self.step,
                            "minutes": round(self.seconds / 60, 2),
                            "samples": self.samples,
                            "samples_per_second": round(self.samples / self.seconds, 1),
                            **{kind: round(sum(losses) / len(losses), 4) for kind, losses in window.items()},
                            "gradient_norm": round(norm, 3),
                            "rate_factor": round(self.rate_factor(), 3),
                            **self.log_fields(),
                        }
                    )
                    window = {}
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
            "kinds": json.dumps(self.kinds),
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
        self.kinds = json.loads(header.get("kinds", "{}"))
        if header.get("device", "cpu") == self.device.type:
            self.random.set_state(tensors["random"])
        else:  # generators of different devices have nothing in common
            self.random.manual_seed(self.settings.seed + 1_000_003 * self.step)
        self.seconds = float(header["seconds"])
        return True


def velocity_loss(
    model: Any,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    tokens: Tensor,
    pooled: Tensor,
    teacher: Any = None,
    **conditions: Tensor,
) -> Tensor:
    """Mean squared error of the predicted velocity ``eps - x0`` at ``x_t = (1 - t) x0 + t eps``; a scalar.

    Args:
        x0, eps: (B, C, [T], H, W) float32 latents and noise.
        t: (B,) times in [0, 1].
        tokens, pooled: (B, L, D) and (B, D) text, in the model's dtype.
        teacher: a network whose velocity there is wanted in place of ``eps - x0``, its mean.
        conditions: further arguments of the model.
    """
    w = t.view(-1, *(1,) * (x0.ndim - 1))
    patches = x0[0, 0].numel() // model.config.patch_size**2
    state = ((1 - w) * x0 + w * eps).to(tokens.dtype)

    def velocity(network: Any) -> Tensor:
        output: Tensor = network(
            hidden_states=state,
            timestep=t * 1000,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            **conditions,
            return_dict=False,
        )[0]
        return output.float()

    with training_attention(x0.device.type, tokens.shape[1] + patches):
        target = eps - x0
        if teacher is not None:
            with torch.no_grad(), scoring_attention():
                target = velocity(teacher)
        return (velocity(model) - target).square().mean()


def is_muon_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains this parameter: the attention and feed-forward matrices of the blocks."""
    return parameter.ndim == 2 and name.startswith("transformer_blocks.") and ".norm" not in name
