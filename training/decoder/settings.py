"""Settings of a decoder's distillation."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

HOUSEKEEPING = frozenset({"minutes", "iterations", "log_every", "save_minutes"})
"""Settings that may differ when a run goes on: they do not touch what is learnt, but for the rates' end."""


class DecoderSettings(BaseModel):
    """What a run decides."""

    model_config = ConfigDict(extra="forbid")

    minutes: float | None = Field(None, ge=0, description="training time, over all resumptions")
    iterations: int | None = Field(None, ge=0, description="updates; ends the run if it comes first")
    blocks: tuple[int, ...] = Field((3, 3, 3, 1), min_length=1, description="residual blocks of each level")
    width: int = Field(64, ge=1, description="channels of every level")
    batch: int = Field(16, ge=1, description="pictures an update")
    crop: int | None = Field(None, ge=4, description="latent positions a side that an update sees; all when None")
    rate: float = Field(2e-3, gt=0, description="AdamW's, after warm-up")
    warmup: int = Field(100, ge=1, description="updates over which the rate rises")
    cooldown_share: float = Field(0.5, gt=0, le=1, description="last share of the run, over which the rate falls")
    final_rate: float = Field(0.02, ge=0, le=1, description="the rate's factor at the end")
    ema_decay: float = Field(0.998, ge=0, lt=1)
    pixel: float = Field(1.0, ge=0, description="weight of L1 on pixels and on their differences")
    perceptual: float = Field(0.0, ge=0, description="weight of EfficientNet-Lite0 features")
    perceptual_from: float = Field(0.0, ge=0, lt=1, description="share of the run after which they are compared")
    adversarial: float = Field(0.0, ge=0, description="weight of the discriminator's opinion")
    adversarial_from: float = Field(0.4, ge=0, lt=1, description="share of the run after which it is asked")
    noised_share: float = Field(0.5, ge=0, le=1, description="share of latents replaced by a noised neighbour")
    noise: float = Field(0.15, ge=0, description="largest standard deviation of that noise; latents have about 1")
    low_share: float = Field(0.25, ge=0, le=1, description="share of batches at a lower stage's size")
    seed: int = 0
    log_every: int = Field(25, ge=1)
    save_minutes: float = Field(5.0, gt=0)

    @model_validator(mode="after")
    def _has_an_end_and_a_loss(self) -> DecoderSettings:
        if self.minutes is None and self.iterations is None:
            raise ValueError("the run has no end: give minutes or iterations")
        if not (self.pixel or self.perceptual):
            raise ValueError("pixel and perceptual are both 0: nothing says what the pictures are to be")
        return self
