"""An engine's side of the door: commands in, messages and pixels out, over one ZeroMQ socket."""

from __future__ import annotations

import os

import numpy as np
import zmq

from rmd.pixels import Pixels
from server.core.messages import Began, Command, Ended, Message, pack, unpack_command
from server.device.settings import RECORD

_PARENT_SECONDS = 1.0


class ParentGone(Exception):  # noqa: N818  -- it says what happened
    """The front has ended: an engine does not outlive it."""


class Door:
    """Used from one thread.

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
        # What runs is also written to a file, which outlasts this process: a message may not have left before it dies.
        self._record = os.open(address.removeprefix("ipc://") + RECORD, os.O_WRONLY | os.O_CREAT, 0o600)

    def send(self, message: Message, pixels: Pixels | None = None) -> None:
        """Send a message; pixels travel as they lie in memory."""
        if isinstance(message, Began | Ended):
            content = pack(message) if isinstance(message, Began) else b""
            os.pwrite(self._record, len(content).to_bytes(4, "big") + content, 0)
        if pixels is None:
            self._socket.send(pack(message))
            return
        self._socket.send(pack(message), zmq.SNDMORE)
        self._socket.send(np.ascontiguousarray(pixels).data, copy=False)

    def receive(self, timeout: float) -> Command | None:
        """Return the next command, or None after ``timeout`` seconds.

        Raises:
            ParentGone: nobody is left to work for.
        """
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
        self._socket.close()
        os.close(self._record)
        if self._parent is not None:
            self._context.term()
