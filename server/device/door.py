"""An engine's side of the door: commands in, messages and pixels out, over one ZeroMQ socket."""

from __future__ import annotations

import os
import time
from typing import Protocol

import numpy as np
import zmq

from rmd.pixels import Pixels
from server.core.messages import Began, Command, Encoded, Ended, HandedOver, Message, pack, pack_batches, unpack_command
from server.core.messages import Pixels as PixelsMessage
from server.core.running import Running
from server.device.settings import RECORD

_PARENT_SECONDS = 1.0
_SHORT_SECONDS = 0.05  # of a batch that the front need not hear of before it is over


class ParentGone(Exception):  # noqa: N818  -- it says what happened
    """The front has ended: an engine does not outlive it."""


class EngineDoor(Protocol):
    """What an engine knows of its front, or fronts. Used from one thread."""

    def send(self, message: Message, pixels: Pixels | None = None) -> None:
        """Send a message; pixels travel as they lie in memory."""

    def flush(self) -> None:
        """Send what is held back for company."""

    def receive(self, timeout: float) -> Command | None:
        """Return the next command, or None after ``timeout`` seconds."""


class Door:
    """To the front that started this engine. Used from one thread.

    Args:
        address: where the front listens.
        parent: the front's process id, watched while waiting; None where both share a process.
    """

    def __init__(self, address: str, parent: int | None = None) -> None:
        self._parent = parent
        self._context = zmq.Context.instance() if parent is None else zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address)
        self._frames: list[bytes | memoryview] = []
        self._ended_at: float | None = None  # when the first of them that ends a batch was put there
        self._gives = False  # some of them give what the front waits for
        # What runs is also written to a file, which outlasts this process: a message may not have left before it dies.
        self._running = Running()
        self._record = os.open(address.removeprefix("ipc://") + RECORD, os.O_WRONLY | os.O_CREAT, 0o600)

    def send(self, message: Message, pixels: Pixels | None = None) -> None:
        """Send a message; pixels travel as they lie in memory.

        Each sending wakes two threads, on cores that have better things to do. So what a batch gave goes out together
        with the word that the next one begins, or as soon as there is none; and where batches follow upon each other
        that are short and give the front nothing to send on, with that of a later one.
        """
        if isinstance(message, Began | Ended):
            self._running.note(message)
            content = pack_batches(self._running.batches)
            os.pwrite(self._record, len(content).to_bytes(4, "big") + content, 0)
        now = time.monotonic()
        if isinstance(message, Ended) and self._ended_at is None:
            self._ended_at = now
        self._frames.append(pack(message))
        if pixels is not None:
            self._frames.append(np.ascontiguousarray(pixels).data)
        self._gives |= isinstance(message, PixelsMessage | HandedOver)
        short = isinstance(message, Began) and message.expected < _SHORT_SECONDS
        follows = self._ended_at is not None and now - self._ended_at < _SHORT_SECONDS
        waits = short and follows and not self._gives
        if not waits and not isinstance(message, Ended | Encoded | HandedOver | PixelsMessage):
            self.flush()

    def flush(self) -> None:
        """Send what is held back for company."""
        if self._frames:
            self._socket.send_multipart(self._frames, copy=False)
            self._frames, self._ended_at, self._gives = [], None, False

    def receive(self, timeout: float) -> Command | None:
        """Return the next command, or None after ``timeout`` seconds.

        Raises:
            ParentGone: nobody is left to work for.
        """
        if timeout > 0:
            self.flush()
        left = timeout
        while True:
            slice_seconds = min(left, _PARENT_SECONDS)
            if self._socket.poll(int(1000 * slice_seconds)):
                return unpack_command(self._socket.recv())
            if self._parent is not None and os.getppid() != self._parent:
                raise ParentGone
            left -= slice_seconds
            if left <= 0:
                return None

    def close(self) -> None:
        """Send what is under way, then close."""
        self.flush()
        self._socket.close()
        os.close(self._record)
        if self._parent is not None:
            self._context.term()
