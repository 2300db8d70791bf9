"""What an engine is told at its start (a process: one line of JSON on its standard input), and where one is met."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from server.core.stages import ALL, Stages
from server.logs import LogFormat

RECORD = ".batch"
"""Ends the name of the file, beside the front's door, in which an engine writes what it runs now."""


HEARTBEAT_MS = 2000
"""Between shared engines and their fronts; five that are missed break the connection."""


class Contact(NamedTuple):
    """Where a shared engine is met.

    Attributes:
        address: ZeroMQ's, such as "tcp://10.0.0.7:41234".
        key: its public CurveZMQ key, Z85-encoded.
    """

    address: str
    key: str


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's share of the server's settings; their meaning is in `server.start.settings`.

    Attributes:
        address: of the front's door.
        parent: the front's process id.
        checkpoints: (folder, model id) of each.
        stages: what it is to do of them.
    """

    address: str
    parent: int
    checkpoints: tuple[tuple[str, str], ...]
    engines: str
    backend: str
    device: str
    dtype: str
    buckets: tuple[int, ...] | None
    threads: int | None
    decoder: str | None = None
    serve_teacher: bool
    measure_teacher: bool
    max_batch: int
    policy: str
    film_seconds: float
    prompt_megabytes: float
    log_level: str
    log_format: LogFormat = "text"
    tracks: int = 1
    stages: Stages = ALL
