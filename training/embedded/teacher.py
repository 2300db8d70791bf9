"""Trains the embedded teacher: an ``SD3Transformer2DModel`` on cached latents, low resolution first, then both.

Rectified flow: ``x_t = (1 - t) x0 + t eps``, the network predicts ``v = eps - x0``. The curriculum (low resolution
first and long) is the one that, in large models, makes the gap between resolutions that RMD closes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from pydantic import Field
from torch import Tensor

from rmd.dtypes import native_dtype
from training.embedded.latents import TeacherData
from training.embedded.velocity import Loss, VelocitySettings, VelocityTrainer, velocity_loss

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


class TeacherSettings(VelocitySettings):
    """What decides a teacher run; stored beside its state, so that a resumed run is the same run."""

    low_share: float = Field(0.5, ge=0, lt=1, description="share of the budget spent on the low resolution alone")
    batch: int = Field(32, ge=1, description="pictures a batch at the full size")
    low_batch: int = Field(128, ge=1, description="pictures a batch at the low size")
    low_every: int = Field(3, ge=2, description="after the low phase, every n-th batch is at the low size")
    full_time_shift: float = Field(
        2.0,
        ge=1,
        description="shift of the times towards noise at the full size; the ratio of the sides is neutral",
    )
    coloured: float = Field(0.25, ge=0, le=1, description="share of samples on a coloured ground")


class TeacherTrainer(VelocityTrainer[TeacherSettings]):
    """The picture teacher's training: low resolution first, then both. The encoded set, too, lies on ``device``."""

    def __init__(
        self,
        settings: TeacherSettings,
        data: TeacherData,
        run: Path,
        transformer_config: dict[str, Any] = TRANSFORMER_CONFIG,
        on_save: Callable[[TeacherTrainer], None] = lambda _trainer: None,
        device: torch.device | str = "cpu",
    ) -> None:
        torch.manual_seed(settings.seed)
        model = initial_transformer(settings.initial, dict(transformer_config))
        super().__init__(settings, model, run, transformer_config, on_save, device)
        self.data = data.to(self.device)

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

    def next_loss(self) -> Loss:
        """Of a batch at the low size, always or every n-th time, else at the full one."""
        return self.loss(low=self.in_low_phase or self.step % self.settings.low_every == 0)

    def loss(self, low: bool) -> Loss:
        """Of a random batch at one of the sizes."""
        x0, tokens, pooled = self.draw(low)
        t = self.times(len(x0), low)
        return Loss(velocity_loss(self.model, x0, self._normal(tuple(x0.shape)), t, tokens, pooled), len(x0))

    def train_step(self, low: bool) -> tuple[float, float]:
        """One update; returns the loss and the gradient's norm before clipping at 1."""
        return self.update(self.loss(low))

    def log_fields(self) -> dict[str, float]:
        """Whether only the low resolution is trained as yet."""
        return {"low_phase": float(self.in_low_phase)}

    @property
    def in_low_phase(self) -> bool:
        """Whether only the low resolution is trained as yet."""
        return self.seconds < 60 * self.settings.minutes * self.settings.low_share

    def ema_model(self) -> SD3Transformer2DModel:
        """A transformer with the averaged weights, in the device's dtype."""
        model = SD3Transformer2DModel(**self.config)
        model.load_state_dict(self.ema, strict=False)  # buffers (position table) are not trained
        return model.to(self.dtype).eval()


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
