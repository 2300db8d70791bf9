"""A unit of work: everything that one request's pictures depend on. Frozen, and small enough to send anywhere.

Noise is keyed by (seed, step), so whoever runs a unit of work makes the same pictures: one that was lost with its
engine is simply given to another.
"""

from __future__ import annotations

import math

import msgspec

from rmd.size import Size


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted request.

    Attributes:
        id: names it everywhere.
        schedule: a name in the model's card.
        model: whose, see :attr:`ModelCard.place`.
        seeds: one a picture.
        guidance_scale, noise_intensity: replace the schedule's own; None leaves them.
        partial_images: how many steps are to be shown on the way.
        frames_per_second: of a film; None for pictures.
        account: whose it is, for fairness between API keys.
        arrived, deadline: monotonic seconds of this host; a film's deadline counts its work instead.
        alone: it was in a batch that ended an engine: no company until it is done.
    """

    id: str
    prompt: str
    schedule: str
    seeds: tuple[int, ...]
    model: str = ""
    negative_prompt: str = ""
    guidance_scale: float | None = None
    noise_intensity: float | None = None
    partial_images: int = 0
    frames_per_second: int | None = None
    account: str = ""
    arrived: float = 0.0
    deadline: float = math.inf
    alone: bool = False
    done: tuple[int, ...] = ()
    """Indices of pictures that are finished already: they are not made again."""

    @property
    def film(self) -> bool:
        """True where a film is asked for."""
        return self.frames_per_second is not None


class PictureRecord(msgspec.Struct):
    """Where one picture's time went (seconds), and in what company."""

    queue: float = 0.0
    encode: float = 0.0
    stages: dict[str, float] = msgspec.field(default_factory=dict)
    decode: float = 0.0
    package: float = 0.0
    batches: dict[str, list[int]] = msgspec.field(default_factory=dict)
    charged: float = 0.0
    """Of the seconds above, its own rows' share: what it cost the device."""

    @property
    def compute(self) -> float:
        """Seconds the picture spent in work, queues left out. A batch's whole time counts for each member."""
        return self.encode + sum(self.stages.values()) + self.decode + self.package


class PictureState(msgspec.Struct, frozen=True, kw_only=True):
    """A picture between two steps: with its work, all that another engine needs to go on with it, to the same bytes.

    Attributes:
        index: which of the request's.
        step: its next one.
        shape: of the latents, a batch of one.
        latents: float32 as the sampler has them between steps, little-endian: nothing is rounded on the way.
        stepped: see :class:`server.core.tickets.Picture`.
        number: of the partial picture that these are to become, at ``size``; -1 for the picture itself.
        fingerprint: of the files of the model that made it, see :attr:`server.core.card.ModelCard.fingerprint`.
    """

    index: int
    step: int
    shape: tuple[int, ...]
    latents: bytes
    record: PictureRecord
    stepped: float = 0.0
    number: int = -1
    size: Size | None = None
    fingerprint: str = ""
