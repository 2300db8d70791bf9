"""Trains the embedded film teacher: the picture teacher's weights, taken on over films at two sizes and pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from diffusers import SD3Transformer2DModel
from pydantic import Field, model_validator
from torch import Tensor

from rmd.backbones.film_transformer import FilmTransformer
from training.embedded.film_latents import FilmBatch, FilmData
from training.embedded.velocity import Loss, VelocitySettings, VelocityTrainer, velocity_loss

BatchKind = Literal["films", "pictures", "frames"]


class FilmSettings(VelocitySettings):
    """What decides a run of the film teacher; stored beside its state."""

    side: int = Field(144, ge=16, description="pixels a side at the full size")
    low_side: int = Field(96, ge=16, description="pixels a side at the low size")
    batch: int = Field(12, ge=1, description="films a batch at the full size")
    low_batch: int = Field(32, ge=1, description="films a batch at the low size")
    picture_batch: int = Field(64, ge=1, description="single pictures a batch, at either size")
    full_share: float = Field(0.25, ge=0, le=1, description="share of the batches that are at the full size")
    picture_share: float = Field(0.15, ge=0, le=1, description="share of the batches that are of single pictures")
    frame_share: float = Field(0.0, ge=0, le=1, description="share of the batches that are of single frames of films")
    thin_share: float = Field(0.6, ge=0, le=1, description="share of the batches of films that see some frames only")
    thin_frames: int = Field(5, ge=2, description="how many frames those see")
    film_time_shift: float = Field(
        2.2, ge=1, description="shift of the times towards noise of films at the low size; the full size has more of it"
    )
    picture_teacher: Path | None = Field(
        None, description="whose pictures are kept; None for ``initial``, where that is a picture teacher"
    )
    picture_weight: float = Field(
        0.0, ge=0, le=1, description="share of the picture teacher's weights in a start from a film teacher"
    )
    cooldown_share: float = Field(0.2, gt=0, le=1)
    muon_rate: float = Field(1e-3, gt=0)
    adam_rate: float = Field(4e-4, gt=0)
    ema_decay: float = Field(0.998, ge=0, lt=1)

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.picture_share + self.frame_share > 1:
            raise ValueError(f"picture_share {self.picture_share} and frame_share {self.frame_share} are more than all")
        return self


class FilmTrainer(VelocityTrainer[FilmSettings]):
    """The film teacher's training.

    Sizes and kinds of batches are mixed from the start, each batch's drawn by the shares in the settings. Shards that
    join the cache while the training goes on are taken up at the next save.

    The network goes on drawing pictures as the picture teacher does: on single ones the target is that one's velocity
    (learning without forgetting, arXiv 1606.09282). Films alone, few and small, cost it its nouns; a film teacher to
    which that happened gets some of them back by a share of the picture teacher's weights (arXiv 2109.01903).

    Args:
        settings: of the run; ``initial`` is the picture teacher's folder, or a film teacher's.
        data: encoded films and pictures.
        run: the folder of the state.
        on_save: called after each save.
        device: where everything lies.

    Raises:
        ValueError: a share of a picture teacher's weights, and no picture teacher.
    """

    def __init__(
        self,
        settings: FilmSettings,
        data: FilmData,
        unconditional: tuple[Tensor, Tensor],
        run: Path,
        on_save: Callable[[FilmTrainer], None] = lambda _trainer: None,
        device: torch.device | str = "cpu",
    ) -> None:
        model = initial_film_transformer(settings.initial)
        pictures = settings.picture_teacher
        if pictures is None and settings.initial is not None and not is_film_teacher(settings.initial):
            pictures = settings.initial
        before = None if pictures is None else initial_film_transformer(pictures).requires_grad_(False)
        if settings.picture_weight:
            if before is None:
                raise ValueError("picture_weight needs a picture teacher: name it, with --picture-teacher")
            mix_weights(model, before, settings.picture_weight)
        config = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
        super().__init__(settings, model, run, config, on_save, device)
        self.picture_teacher = None if before is None else before.to(self.device, self.dtype).eval()
        self.data = data
        self.empty = tuple(part.to(self.device) for part in unconditional)

    def next_loss(self) -> Loss:
        """Of a random batch of random kind and size."""
        s = self.settings
        kind, size = self._uniform(2).tolist()
        at_full = size < s.full_share
        if kind < s.picture_share:
            return self.loss("pictures", at_full, s.picture_batch)
        if kind < s.picture_share + s.frame_share:
            return self.loss("frames", at_full, s.picture_batch)
        return self.loss("films", at_full, s.batch if at_full else s.low_batch)

    def loss(self, kind: BatchKind, full: bool, count: int) -> Loss:
        """Of ``count`` random films, pictures or frames at one of the sizes."""
        s = self.settings
        batch = self.data.draw(
            "pictures" if kind == "pictures" else "films", s.side if full else s.low_side, count, self.random
        )
        tokens, pooled = self._drop_text(batch)
        t = self.times(count, kind, full)
        latents, conditions = batch.latents, {}
        frames = latents.shape[2]
        if kind == "frames":  # one of each film: as a picture of a thing of that size at that place
            latents = latents[torch.arange(count, device=self.device), :, self._integers(frames, count)].unsqueeze(2)
        teacher = self.picture_teacher if kind == "pictures" else None
        if kind == "films" and s.thin_frames < frames and self._uniform(1).item() < s.thin_share:
            # Frames are much alike: fewer of them cost half, and teach the same motion.
            shuffled = self._uniform(frames).argsort()[: s.thin_frames]
            conditions["frame_numbers"] = shuffled.sort().values
            latents = latents[:, :, conditions["frame_numbers"]]
        noise = self._normal(tuple(latents.shape))
        value = velocity_loss(self.model, latents, noise, t, tokens, pooled, teacher, **conditions)
        name = f"films_{'full' if full else 'low'}" if kind == "films" else kind
        return Loss(value, count, name)

    def _drop_text(self, batch: FilmBatch) -> tuple[Tensor, Tensor]:
        """The texts in the network's dtype, some of them replaced by the empty prompt."""
        dropped = self._uniform(len(batch.tokens)) < self.settings.drop_text
        tokens = torch.where(dropped[:, None, None], self.empty[0], batch.tokens)
        pooled = torch.where(dropped[:, None], self.empty[1], batch.pooled)
        return tokens.to(self.dtype), pooled.to(self.dtype)

    def times(self, count: int, kind: BatchKind, full: bool) -> Tensor:
        """(B,) times: logit-normal, a share uniform, then shifted towards noise: of more pixels, and of nine alike
        frames, more can be told at the same time."""
        s = self.settings
        normal = torch.sigmoid(self._normal((count,)))
        t = torch.where(self._uniform(count) < s.uniform_times, self._uniform(count), normal)
        shift = (s.film_time_shift if kind == "films" else 1.0) * (s.side / s.low_side if full else 1.0)
        return shift * t / (1 + (shift - 1) * t)

    def log_fields(self) -> dict[str, float]:
        """Films in memory, and samples of each kind so far."""
        return {"cached": self.data.refresh(), **self.kinds}

    def ema_model(self) -> FilmTransformer:
        """A transformer with the averaged weights, in the device's dtype."""
        model = FilmTransformer(**self.config)
        model.load_state_dict(self.ema, strict=False)  # buffers (position table) are not trained
        return cast(FilmTransformer, model.to(self.dtype).eval())


def initial_film_transformer(folder: Path | None) -> FilmTransformer:
    """The film network that a training starts from, float32.

    Args:
        folder: a picture teacher's or a film teacher's; None for random weights.
    """
    film: FilmTransformer = FilmTransformer()
    if folder is None:
        return film
    options: dict[str, Any] = {"subfolder": "transformer", "use_safetensors": True, "torch_dtype": torch.float32}
    if is_film_teacher(folder):
        film = FilmTransformer.from_pretrained(str(folder), **options)
    else:
        film = FilmTransformer.from_pictures(SD3Transformer2DModel.from_pretrained(str(folder), **options))
    return film


def mix_weights(film: FilmTransformer, pictures: FilmTransformer, share: float) -> None:
    """Moves a film network's weights towards a picture network's by ``share`` of the way, in place; which frame is
    which stays its own knowledge."""
    other = dict(pictures.named_parameters())
    with torch.no_grad():
        for name, weight in film.named_parameters():
            if name != "temporal_embed":
                weight.lerp_(other[name], share)


def is_film_teacher(folder: Path) -> bool:
    """Whether the teacher in a folder is one of films, not of pictures."""
    config = FilmTransformer.load_config(str(folder), subfolder="transformer")
    return bool(config["_class_name"] == FilmTransformer.__name__)
