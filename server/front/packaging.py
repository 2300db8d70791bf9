"""Pixels to files, in threads beside the event loop. Compressing lets go of the interpreter's lock."""

from __future__ import annotations

import base64
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rmd.size import Size
from server.core.messages import Pixels
from server.core.work import PictureRecord
from server.front.generation import Event, FinishedPicture, Generation, PartialPicture
from server.front.media import encode_film, encode_picture, encode_spritesheet, encode_thumbnail

_NICE = 5

Done = Callable[[Generation, Pixels, Event | Exception | None], None]


class Packager:
    """A pool that compresses pictures and films.

    Args:
        threads: of the pool.
        done: called on a pool thread with what became of each: its event, why there is none, or None where the
            request has ended.
    """

    def __init__(self, threads: int, done: Done) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rmd-package", initializer=_step_back)
        self._done = done

    def submit(self, generation: Generation, message: Pixels, values: memoryview) -> None:
        """Compress what ``values`` hold, (T,) H, W, 3 of uint8."""
        self._pool.submit(self._run, generation, message, values, time.monotonic())

    def close(self) -> None:
        """Finish what was begun."""
        self._pool.shutdown(wait=True)

    def _run(self, generation: Generation, message: Pixels, values: memoryview, since: float) -> None:
        result: Event | Exception | None = None
        try:
            if not generation.failed:
                result = _package(generation, message, values, since)
        except Exception as error:  # told to whoever counts endings: a thread pool would swallow it
            result = error
        self._done(generation, message, result)


def _step_back() -> None:
    """Let the device's threads go first, which wait for each other: one that is kept from its core holds up all."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICE)


def _package(generation: Generation, message: Pixels, values: memoryview, since: float) -> Event:
    spec = generation.spec
    pixels = np.frombuffer(values, dtype=np.uint8).reshape(message.shape)
    started = time.monotonic()
    metadata = dict(spec.metadata)
    if message.number >= 0:
        content = encode_picture(pixels, spec.output_format, spec.output_compression, metadata)
        return PartialPicture(message.index, message.number, Size.parse(message.size), content, _base64(content))
    record = message.record or PictureRecord()
    record.queue += started - since
    thumbnail = spritesheet = b""
    if spec.frames_per_second is not None:
        content = encode_film(pixels, spec.frames_per_second)
        thumbnail, spritesheet = encode_thumbnail(pixels), encode_spritesheet(pixels)
    else:
        metadata["rmd:seed"] = str(spec.seeds[message.index])
        content = encode_picture(pixels, spec.output_format, spec.output_compression, metadata)
    encoded = "" if spec.film or not spec.base64 else _base64(content)
    record.package = time.monotonic() - started
    return FinishedPicture(message.index, content, record, encoded, thumbnail, spritesheet)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
