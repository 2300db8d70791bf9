"""A shared engine's side towards its fronts: any number of them, here or on other hosts, that come and go.

Over TCP, each side known to the other by its CurveZMQ key. What an engine says of itself and of its batches goes to
every front, what it says of a request to the front that sent it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable

import msgspec
import numpy as np
import zmq
from zmq.auth.thread import ThreadAuthenticator

from rmd.pixels import Pixels
from server.core.messages import (
    Baselines,
    Began,
    Cancel,
    Changed,
    Command,
    Encoded,
    Ended,
    HandedOver,
    Hello,
    Leaving,
    Lost,
    Message,
    Ready,
    Stop,
    Submit,
    Unable,
    pack,
    unpack_command,
)
from server.core.messages import Pixels as PixelsMessage
from server.core.running import Running
from server.device.front_seat import FrontSeat
from server.device.settings import HEARTBEAT_MS, Contact

log = logging.getLogger("rmd.server")

_DOMAIN = "rmd"
_SLICE_SECONDS = 0.2


class OpenDoor:
    """Used from one thread, but for :meth:`admit`, :meth:`leave` and what can be looked at.

    Args:
        host: the address of this machine that fronts reach; the port is any free one.

    Attributes:
        contact: where fronts meet this engine.
        ready: set once its models are loaded.
        unable: why it cannot start, or cannot go on.
        batch: what runs, and since when (monotonic seconds).
    """

    def __init__(self, host: str) -> None:
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._admitted: set[bytes] = set()
        self._authenticator.configure_curve_callback(_DOMAIN, credentials_provider=self)
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 2000),
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
            (zmq.ROUTER_MANDATORY, 1),  # a front that is gone is an error, not silence
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, 5 * HEARTBEAT_MS),
            (zmq.ZAP_ENFORCE_DOMAIN, 1),  # without its authenticator nobody is let in
        ):
            self._socket.setsockopt(option, value)
        public, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.curve_server, self._socket.zap_domain = True, _DOMAIN.encode()
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.contact = Contact(f"tcp://{host}:{port}", public.decode())
        self._seats: dict[bytes, FrontSeat] = {}
        self._told: dict[object, Message] = {}  # what a front that comes later has to hear
        self._commands: deque[Command] = deque()
        self._leave = threading.Event()
        self._leaving = False
        self.ready = threading.Event()
        self.unable: Unable | None = None
        self.running = Running()

    # -- called from any thread ----------------------------------------------------------------------------------------

    def admit(self, keys: Iterable[bytes]) -> None:
        """Let fronts in whose public key (Z85) is among these, from now on no others."""
        self._admitted = set(keys)

    def callback(self, domain: str, key: bytes) -> bool:
        """Asked by the authenticator whether a key is known."""
        return key in self._admitted

    def leave(self) -> None:
        """Have the engine end once it has made what it was given; fronts are told to give it nothing new."""
        self._leave.set()

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def send(self, message: Message, pixels: Pixels | None = None) -> None:
        """Send a message to the front or fronts that it concerns; pixels travel as they lie in memory.

        As through `server.device.door.Door`, what a batch gave goes out together with what follows upon it.
        """
        began = self.running.note(message)
        counts = None if began is None else self._counting_seat(began)
        self._note(message)
        if isinstance(message, Encoded | HandedOver | PixelsMessage | Lost):
            for seat in self._seats.values():
                if seat.owns(message.id):
                    seat.frames.append(pack(message))
                    if pixels is not None:
                        seat.frames.append(np.ascontiguousarray(pixels).data)
                    seat.told(message)
        else:
            for seat in self._seats.values():
                seat.frames.append(pack(seat.version(message, counts is None or seat is counts)))
        if not isinstance(message, Ended | Encoded | HandedOver | PixelsMessage):
            self.flush()

    def flush(self) -> None:
        """Send what is held back for company."""
        for identity, seat in list(self._seats.items()):
            if not seat.frames:
                continue
            frames, seat.frames = seat.frames, []
            try:
                self._socket.send_multipart([identity, *frames], copy=False)
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self._forget(identity)

    def receive(self, timeout: float) -> Command | None:
        """Return the next command, or None after ``timeout`` seconds."""
        if timeout > 0:
            self.flush()
        end = time.monotonic() + timeout
        while True:
            if self._leave.is_set() and not self._leaving:
                self._leaving = True
                self.send(Leaving())
            left = end - time.monotonic()
            if not self._commands and self._socket.poll(int(1000 * max(min(left, _SLICE_SECONDS), 0.0))):
                identity, data = self._socket.recv_multipart()
                try:
                    self._heed(identity, unpack_command(data))
                except msgspec.DecodeError as error:
                    log.error("a front speaks another version's language: %s", error)
            if not self._commands and self._leaving and not any(seat.work for seat in self._seats.values()):
                self._leave.clear()
                self._leaving = False
                return Stop()
            if self._commands:
                return self._commands.popleft()
            if left <= 0:
                return None

    def close(self) -> None:
        """Send what is under way, then close."""
        self.flush()
        self._socket.close()
        self._authenticator.stop()
        self._context.term()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _note(self, message: Message) -> None:
        if isinstance(message, Ready):
            self._told[Ready] = message
            self.ready.set()
        elif isinstance(message, Changed):
            self._told[Changed, message.key] = message
        elif isinstance(message, Baselines):
            self._told[Baselines, message.model] = message
        elif isinstance(message, Unable):
            self.unable = message

    def _heed(self, identity: bytes, command: Command) -> None:
        """Take in what a front says; what concerns the engine is left in ``_commands``."""
        if isinstance(command, Hello):
            for old, seat in list(self._seats.items()):
                if seat.name == command.front:
                    self._forget(old)
            seat = self._seats[identity] = FrontSeat(command)
            told = [*self._told.values(), *([Leaving()] if self._leaving else [])]
            seat.frames.extend(pack(seat.version(message)) for message in told)
            self.flush()
        elif isinstance(command, Stop):
            pass  # it is not one front's to end
        elif identity in self._seats:
            seat = self._seats[identity]
            if isinstance(command, Submit):
                command = seat.take(command)
            elif isinstance(command, Cancel):
                seat.work.pop(command.id, None)
            self._commands.append(command)

    def _forget(self, identity: bytes) -> None:
        """A front is gone, and what it wanted with it."""
        seat = self._seats.pop(identity)
        self._commands.extend(Cancel(request_id) for request_id in seat.work)

    def _counting_seat(self, began: Began) -> FrontSeat | None:
        """Return the one front that counts a batch that ran: that of its first request, if it is still here."""
        seats = list(self._seats.values())
        if not seats:
            return None
        first = next(iter([*(request_id for request_id, _ in began.members), *began.previews]), "")
        return next((seat for seat in seats if seat.owns(first)), seats[0])
