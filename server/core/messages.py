"""What passes through an engine's door, both ways: msgspec structs, msgpack on the wire, never pickle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import msgspec

from server.core.card import ModelCard, TeacherBaseline
from server.core.stages import ALL, Stages
from server.core.stations import StationKey
from server.core.work import PictureRecord, PictureState, Work


class _Struct(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


# -- to the engine -----------------------------------------------------------------------------------------------------


class Submit(_Struct, frozen=True):
    """Make this: the pictures that are not ``work.done``, and go on with those of ``states``.

    Attributes:
        sent: monotonic seconds of the front's host; 0 where not told.
        elsewhere: later stages of these pictures that another engine will be free for sooner: they are handed over
            before them, though this engine has them too.
    """

    work: Work
    states: tuple[PictureState, ...] = ()
    sent: float = 0.0
    elsewhere: Stages = frozenset()


class Cancel(_Struct, frozen=True):
    """Make it no longer."""

    id: str


class Adopt(_Struct, frozen=True):
    """Engines have been built: take them over."""


class UsePolicy(_Struct, frozen=True):
    """Schedule by this policy from now on (see `server.core.policies.make_policy`)."""

    policy: str


class Ping(_Struct, frozen=True):
    """Answer at once."""

    number: int


class Stop(_Struct, frozen=True):
    """End after the batch that runs."""


class Hello(_Struct, frozen=True):
    """A front joins a shared engine, or begins anew: then what it had here is forgotten.

    Attributes:
        front: its name.
        now: monotonic seconds of its host.
    """

    front: str
    now: float


Command: TypeAlias = Submit | Cancel | Adopt | UsePolicy | Ping | Stop | Hello


# -- from the engine ---------------------------------------------------------------------------------------------------


class Loading(_Struct, frozen=True):
    """How far the start is."""

    done: int
    total: int
    text: str


class Ready(_Struct, frozen=True):
    """The models are loaded and warm.

    Attributes:
        costs: (station, rows, seconds).
        missing: why each checkpoint that could not be loaded could not, by model id.
        clock: seconds since 1970 less its monotonic seconds, by which others understand its times; 0 where not told.
        stages: what it can do; pictures go on elsewhere behind that.
    """

    cards: tuple[ModelCard, ...]
    costs: tuple[tuple[StationKey, int, float], ...]
    missing: Mapping[str, str] = {}
    clock: float = 0.0
    stages: Stages = ALL


class Unable(_Struct, frozen=True):
    """The engine cannot start, or cannot go on; it ends. ``usage``: what the user can mend, so no other try helps."""

    reason: str
    usage: bool = False


class Changed(_Struct, frozen=True):
    """A station runs on something else now, which costs this: (rows, seconds). ``complete``: so do all of its model.
    ``executor_kind``: the backend that serves the model by now."""

    key: StationKey
    compiled: tuple[int, ...]
    costs: tuple[tuple[int, float], ...]
    complete: bool
    memory_bytes: Mapping[str, int]
    executor_kind: str


class Busy(_Struct, frozen=True):
    """Nothing will be heard for up to this many seconds: an engine is loaded, or the teacher timed."""

    seconds: float


class Baselines(_Struct, frozen=True):
    """The teacher has been timed again. ``model``: whose, see :attr:`ModelCard.place`."""

    baselines: tuple[TeacherBaseline, ...]
    model: str = ""


class Began(_Struct, frozen=True):
    """A batch begins. ``members``: (request, picture); ``previews``: the requests of its previews."""

    batch: int
    key: StationKey
    members: tuple[tuple[str, int], ...]
    previews: tuple[str, ...]
    expected: float


class Moved(_Struct, frozen=True):
    """A picture after a batch: its next step and station, here or on another engine; none where it is made."""

    id: str
    index: int
    step: int
    station: StationKey | None


class Ended(_Struct, frozen=True):
    """A batch is over. ``failed``: it raised, and its tickets are "retried" alone, or "lost".
    ``at``: when, in the engine's monotonic seconds; 0 where it raised. ``tracks``: it had that part of the device."""

    batch: int
    key: StationKey
    rows: int
    company: int
    seconds: float
    moved: tuple[Moved, ...]
    failed: str = ""
    at: float = 0.0
    tracks: int = 1


class Encoded(_Struct, frozen=True):
    """A request's text is known: tokens heard, and tokens cut off."""

    id: str
    tokens: int
    cut: int


class Pixels(_Struct, frozen=True):
    """A picture, film or preview (``number``: which partial picture); its uint8 values follow in a frame."""

    id: str
    index: int
    shape: tuple[int, ...]
    size: str
    number: int = -1
    record: PictureRecord | None = None


class HandedOver(_Struct, frozen=True):
    """A picture, or a partial one, leaves for an engine of its next stage. This one has forgotten it."""

    id: str
    state: PictureState


class Lost(_Struct, frozen=True):
    """A request has ended early: "late", or "failed" with the reason for the log."""

    id: str
    why: str
    reason: str


class Pong(_Struct, frozen=True):
    """The answer to a ping."""

    number: int


class Leaving(_Struct, frozen=True):
    """The engine finishes what it has, then ends: it is to be given nothing new."""


_OfModel: TypeAlias = Loading | Ready | Unable | Changed | Busy | Baselines | Pong | Leaving
_OfWork: TypeAlias = Began | Ended | Encoded | Pixels | HandedOver | Lost
Message: TypeAlias = _OfModel | _OfWork

_encoder = msgspec.msgpack.Encoder()
_commands = msgspec.msgpack.Decoder(Command)
_messages = msgspec.msgpack.Decoder(Message)
_batches = msgspec.msgpack.Decoder(tuple[Began, ...])


def pack(message: Command | Message) -> bytes:
    """Return a message as bytes."""
    return _encoder.encode(message)


def unpack_command(data: bytes) -> Command:
    """Read what :func:`pack` wrote for the engine.

    Raises:
        msgspec.DecodeError: it is something else.
    """
    command: Command = _commands.decode(data)
    return command


def unpack_message(data: bytes) -> Message:
    """Read what :func:`pack` wrote for the front.

    Raises:
        msgspec.DecodeError: it is something else.
    """
    message: Message = _messages.decode(data)
    return message


def pack_batches(batches: Sequence[Began]) -> bytes:
    """Return the batches that run as bytes."""
    return _encoder.encode(batches)


def unpack_batches(data: bytes) -> tuple[Began, ...]:
    """Read what :func:`pack_batches` wrote.

    Raises:
        msgspec.DecodeError: it is something else.
    """
    return _batches.decode(data)
