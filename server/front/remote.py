"""The front's side of an engine that others started, on this host or another one, and that other fronts use too."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from server.core.messages import Began, Hello
from server.core.running import Running
from server.device.settings import HEARTBEAT_MS, Contact
from server.front.engine import Line, Received

_CONNECT_SECONDS = 5.0
_LAST_WORDS_MS = 1000
_BROKEN = (
    zmq.EVENT_DISCONNECTED,
    zmq.EVENT_CLOSED,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
)


class KeyPair(NamedTuple):
    """A CurveZMQ key pair, Z85-encoded."""

    public: bytes
    secret: bytes


class RemoteEngine(Line):
    """See `server.front.engine.EngineLink`. Once its connection breaks it counts as ended; another one may be made.

    Args:
        contact: where the engine is met, and its public key: nobody else can answer.
        keys: the front's own, whose public half the engine knows.
        front: names this front to the engine.
    """

    def __init__(self, contact: Contact, keys: KeyPair, front: str) -> None:
        super().__init__(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, _LAST_WORDS_MS)
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)  # what was under way is lost: only the fleet can begin again
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 5 * HEARTBEAT_MS)
        self.socket.curve_publickey, self.socket.curve_secretkey = keys
        self.socket.curve_serverkey = contact.key.encode()
        self._events = self.socket.get_monitor_socket()
        self._connected = self._broken = False
        self._begun = time.monotonic()
        self._running = Running()
        self.socket.connect(contact.address)
        self.send(Hello(front, time.monotonic()))

    def receive(self, timeout: float = 0.0) -> Received | None:
        """Return the next message, and the pixels that came with it; None after ``timeout`` seconds."""
        received = super().receive(timeout)
        if received is not None:
            self._running.note(received[0])
        return received

    @property
    def running(self) -> bool:
        """Whether it is connected, or may still come to be."""
        while not self._broken and self._events.poll(0):
            event = recv_monitor_message(self._events)["event"]
            self._connected |= event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self._broken |= event in _BROKEN
        late = not self._connected and time.monotonic() - self._begun > _CONNECT_SECONDS
        return not (self._broken or late)

    def last_batches(self) -> Sequence[Began]:
        """Return the batches that run, or ran when it died, as far as was heard."""
        return self._running.batches

    def kill(self) -> None:
        """Break with it: whoever started it has to end it."""
        self._broken = True

    def stop(self, timeout: float = 0.0) -> None:
        """Break with it: it forgets this front's work, and serves the others."""
        self._broken = True

    def close(self) -> None:
        """Give the connection up."""
        with contextlib.suppress(zmq.ZMQError):
            self.socket.disable_monitor()
        super().close()
