"""A generation (one HTTP request's pictures) and its items (one picture each) on their way through the stations."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rmd.backbones.base import Conditioning
from rmd.cascade import Cascade
from rmd.size import Size
from server.core.admission import Permit
from server.core.latency import StationKey
from server.front.media import OutputFormat
from server.http.errors import ApiError


@dataclass(frozen=True)
class GenerationSpec:
    """What was asked for, validated. ``seeds`` holds one entry a picture."""

    prompt: str
    schedule: str
    cascade: Cascade
    lane: str
    seeds: tuple[int, ...]
    negative_prompt: str = ""
    partial_images: int = 0
    output_format: OutputFormat = "png"
    output_compression: int | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    frames_per_second: int | None = None
    """Of a film, whose progress is reported; None for pictures."""

    @property
    def guided(self) -> bool:
        """True where each item needs an unconditional row beside its own."""
        return self.cascade.guidance_scale != 1.0


@dataclass
class ItemRecord:
    """Where one picture's time went (seconds), and in what company."""

    queue: float = 0.0
    encode: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    decode: float = 0.0
    package: float = 0.0
    batches: dict[str, list[int]] = field(default_factory=dict)

    @property
    def compute(self) -> float:
        """Seconds the picture spent in work, queues left out. A batch's whole time counts for each member."""
        return self.encode + sum(self.stages.values()) + self.decode + self.package


@dataclass(frozen=True)
class PartialPicture:
    """Event: a low stage's result, decoded."""

    index: int
    partial_index: int
    size: Size
    content: bytes


@dataclass(frozen=True)
class FinishedPicture:
    """Event: one picture, or film, is complete. Films come with two pictures of themselves."""

    index: int
    content: bytes
    record: ItemRecord
    thumbnail: bytes = b""
    spritesheet: bytes = b""


@dataclass(frozen=True)
class Advanced:
    """Event, of films only: the first step begins (share 0), or a step is done.

    ``share`` of the expected work behind the item, text left out.
    """

    share: float


@dataclass(frozen=True)
class Failed:
    """Event: the generation ended without its pictures; nothing follows."""

    error: ApiError


Event = PartialPicture | FinishedPicture | Advanced | Failed


class Generation:
    """One admitted request.

    Args:
        spec: what to make.
        permit: its items give their places back as they leave, one by one.
        deadline: monotonic seconds after which it is dropped.
        sink: called with each event, from any thread; must not block.
        costs: ``costs[k]`` is the expected seconds from the start of step k to the finished picture; one entry
            more than there are steps (the last: decoding alone).
        request_id: names the request in the log.
    """

    def __init__(
        self,
        spec: GenerationSpec,
        permit: Permit,
        deadline: float,
        sink: Callable[[Event], None],
        costs: Sequence[float],
        request_id: str = "",
    ) -> None:
        self.spec = spec
        self.permit = permit
        self.arrived = time.monotonic()
        self.deadline = deadline
        self.sink = sink
        self.costs = tuple(costs)
        self.request_id = request_id
        self.conditioning: Conditioning | None = None
        self.unconditional: Conditioning | None = None
        self.text_tokens = 0
        self.failed = False
        self.items = [Item(self, index, seed) for index, seed in enumerate(spec.seeds)]
        self.remaining_items = len(self.items)

    def seconds_left(self) -> float:
        """Return the seconds until the deadline; negative once it has passed."""
        return self.deadline - time.monotonic()


class Entry(abc.ABC):
    """Something that stands in a station's queue."""

    rows: int = 1

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.joined = generation.arrived

    @property
    @abc.abstractmethod
    def remaining_seconds(self) -> float:
        """Expected work until this entry leaves the house, queues left out."""


class Item(Entry):
    """One picture or film. ``step`` is the next denoising step; ``latents`` are float32 (1, C, [T], H, W)."""

    def __init__(self, generation: Generation, index: int, seed: int) -> None:
        super().__init__(generation)
        self.index = index
        self.seed = seed
        self.step = 0
        self.latents: Tensor | None = None
        self.record = ItemRecord()
        self.left = False

    @property
    def rows(self) -> int:  # type: ignore[override]
        """Rows of a denoiser batch that this item takes."""
        return 2 if self.generation.spec.guided else 1

    @property
    def remaining_seconds(self) -> float:
        """Expected seconds from this item's next step to its finished picture."""
        return self.generation.costs[min(self.step, len(self.generation.costs) - 1)]

    @property
    def share(self) -> float:
        """The share of this item's expected work that is done."""
        return 1.0 - self.remaining_seconds / max(self.generation.costs[0], 1e-9)

    def station(self) -> StationKey:
        """Return where this item stands next: its next step's size, or decode after the last one."""
        cascade, lane = self.generation.spec.cascade, self.generation.spec.lane
        if self.generation.conditioning is None:
            return StationKey("encode")
        if self.step < len(cascade.steps):
            return StationKey("denoise", lane, cascade.steps[self.step].size)
        return StationKey("decode", size=cascade.full_size)


class Preview(Entry):
    """A low stage's x0 prediction on its way to becoming a partial picture."""

    def __init__(self, item: Item, x0: Tensor, size: Size, partial_index: int) -> None:
        super().__init__(item.generation)
        self.item = item
        self.latents = x0
        self.size = size
        self.partial_index = partial_index
        self.joined = time.monotonic()

    @property
    def remaining_seconds(self) -> float:
        """A preview only needs decoding."""
        return self.generation.costs[-1]


def partial_steps(cascade: Cascade, wanted: int) -> tuple[int, ...]:
    """Return the steps after which a partial picture is shown, at most ``wanted``.

    The ends of the stages below the last one come first (a cascade's low result is a whole picture); a schedule
    of one stage shows evenly spaced steps instead. Never the last step: that is the picture itself.
    """
    last = len(cascade.steps) - 1
    if wanted <= 0 or last < 1:
        return ()
    boundaries = [i for i in range(last) if cascade.steps[i + 1].size != cascade.steps[i].size]
    if boundaries:
        return tuple(boundaries[-wanted:])
    spaced = {round((i + 1) * last / (wanted + 1)) for i in range(wanted)}
    return tuple(sorted(step for step in spaced if 0 <= step < last))
