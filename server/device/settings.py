"""What an engine process is told on its standard input: one line of JSON."""

from __future__ import annotations

import msgspec

from server.logs import LogFormat

RECORD = ".batch"
"""Ends the name of the file, beside the front's door, in which an engine writes what it runs now."""


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's share of the server's settings; their meaning is in `server.start.settings`.

    Attributes:
        address: of the front's door.
        parent: the front's process id.
        checkpoints: (folder, model id) of each.
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
