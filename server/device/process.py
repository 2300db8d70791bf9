"""``python -m server.device.process``: one engine. Started by the front, which writes its settings to the input."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from server.device.door import Door, EngineDoor, ParentGone
from server.device.settings import EngineSettings
from server.garbage import settle_heap
from server.logs import configure_logging

if TYPE_CHECKING:
    from server.device.engine import Engine

_WATCH_SECONDS = 1.0


def main() -> None:
    """Serve one front until it says stop, or is gone."""
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineSettings)
    configure_logging(settings.log_level, settings.log_format, place=settings.device)
    # A terminal's Ctrl-C, or a supervisor's SIGTERM, reaches the whole group; when to stop is the front's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_watch_front, args=(settings,), name="front-watch", daemon=True).start()
    door = Door(settings.address, settings.parent)
    try:
        make_engine(settings, door).run()
    except ParentGone:
        _end_orphaned(settings)
    door.close()
    # Not through the interpreter's end: libraries' thread pools and loaded engines take seconds over it.
    sys.stderr.flush()
    os._exit(0)


def make_engine(settings: EngineSettings, door: EngineDoor) -> Engine:
    """Return an engine that is yet to load its models."""
    from server.device.engine import Engine  # torch: whoever waits at the door has it opened first
    from server.device.loading import load_models

    return Engine(
        door,
        lambda report: load_models(settings, report),
        settings.policy,
        settings.film_seconds,
        int(settings.prompt_megabytes * 1e6),
        settle_heap,
        settings.tracks,
    )


def _watch_front(settings: EngineSettings) -> None:
    """End with the front also while a model loads or a batch hangs, when nobody looks at the door."""
    while os.getppid() == settings.parent:
        time.sleep(_WATCH_SECONDS)
    _end_orphaned(settings)


def _end_orphaned(settings: EngineSettings) -> None:
    shutil.rmtree(Path(settings.address.removeprefix("ipc://")).parent, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()
