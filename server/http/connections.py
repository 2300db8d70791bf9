"""How many connections are held, for how long a silent one, and how much for who does not read.

Every connection takes a descriptor, and so does every file, pipe and encoder: connections are bounded far below the
limit, so that whoever opens many of them cannot stop the rest. Where all places are taken, a newcomer takes that of
whoever has been silent longest; where all are at work, it is let in for a probe alone.

A reply lies in memory until its client has read it, long after its places in the queue were given to others. So a
client must keep a pace, and where too much is unread, whoever has been behind longest is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.core.faults import Fault, RequestError
from server.front.channel import Held
from server.http.errors import error_response
from server.http.incoming import CLIENT_PATIENCE_SECONDS
from server.http.origins import CROWDED
from server.http.streaming import HELD

_MOST_DESCRIPTORS = 65_536
_MOST_CONNECTIONS = 4096
_LONGEST_BACKLOG = 2048
_PROBES = 16
"""Connections beyond the bound, kept for probes."""
_LEAST_PACE = 16_384
"""Bytes a second that a client must read, with ``CLIENT_PATIENCE_SECONDS`` a reply on top."""
_MOST_UNREAD = 256 * 1024 * 1024
"""Bytes of replies, of all clients, that were not read yet."""


def raise_descriptor_limit() -> int:
    """Raise this process's limit of open descriptors as far as it may, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has a lower bound, which it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def bounds(descriptors: int) -> tuple[int, int]:
    """Return the most connections, and the longest line of those not accepted yet.

    The line is accepted at one go, before anybody can be sent away: it takes descriptors too.
    """
    return min(descriptors // 2, _MOST_CONNECTIONS), min(descriptors // 8, _LONGEST_BACKLOG)


class Doorway:
    """The open connections of one server, in the order in which they fell silent."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: set[BoundedProtocol] = set()
        self._silent: dict[BoundedProtocol, None] = {}
        self._behind: dict[BoundedProtocol, None] = {}  # in the order in which they fell behind

    def enter(self, newcomer: BoundedProtocol) -> bool:
        """Let one in, if need be in place of another; False where it is let in for a probe alone, or not at all."""
        self._open.add(newcomer)
        if len(self._open) <= self._most:
            return True
        longest = next(iter(self._silent), None)
        if longest is not None:
            self._turn_out(longest)
            return True
        if len(self._open) > self._most + _PROBES:
            self._turn_out(newcomer)
        return False

    def heard(self, connection: BoundedProtocol, silent: bool) -> None:
        """Note whether a connection waits for its client, or has a whole request that is at work."""
        if not silent:
            self._silent.pop(connection, None)
        elif connection in self._open:
            self._silent.setdefault(connection)

    def fell_behind(self, connection: BoundedProtocol) -> None:
        """Note that a client does not read as fast as it is written to."""
        self._behind.setdefault(connection)
        unread = sum(each.unread for each in self._behind)
        while unread > _MOST_UNREAD:
            longest = next(iter(self._behind))
            unread -= longest.unread
            self._turn_out(longest)

    def caught_up(self, connection: BoundedProtocol) -> None:
        """Note that a client has read all that was written."""
        self._behind.pop(connection, None)

    def leave(self, connection: BoundedProtocol) -> None:
        """Forget a connection that is closed."""
        self._open.discard(connection)
        self._silent.pop(connection, None)
        self._behind.pop(connection, None)

    def _turn_out(self, connection: BoundedProtocol) -> None:
        self.leave(connection)
        connection.transport.abort()


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, within a :class:`Doorway`, with time limits on heads and replies and one shape of errors."""

    def __init__(self, *args: Any, doorway: Doorway, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._doorway = doorway
        self._head_timer: asyncio.TimerHandle | None = None
        self._held = Held()
        self._patience = CLIENT_PATIENCE_SECONDS
        self._due = 0.0  # when, by the loop's clock, a client in pace will have read what was written
        self._pace_timer: asyncio.TimerHandle | None = None

    @property
    def unread(self) -> int:
        """Bytes that the client is still to read, those in the system's own buffers left out."""
        return self.transport.get_write_buffer_size() + self._held.bytes

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Let the client in."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that it is told here whenever the system takes no more
        crowded = not self._doorway.enter(self)
        self.app_state = {**self.app_state, HELD: self._held, CROWDED: crowded}
        self._doorway.heard(self, silent=True)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client."""
        self._doorway.leave(self)
        self._forget_timer()
        self._keep_pace(None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait for a client that reads too slowly, for a while."""
        super().pause_writing()
        self._due = self.loop.time() + self.transport.get_write_buffer_size() / _LEAST_PACE
        self._keep_pace(self.loop.call_at(self._due + self._patience, self.transport.abort))
        self._doorway.fell_behind(self)

    def resume_writing(self) -> None:
        """Go on with a client that has read what was written."""
        super().resume_writing()
        self._doorway.caught_up(self)
        self._keep_pace(None)
        self._patience -= max(self.loop.time() - self._due, 0.0)

    def handle_events(self) -> None:
        """Read what has come."""
        super().handle_events()
        self._look()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._patience = CLIENT_PATIENCE_SECONDS
        super().on_response_complete()
        self._look()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(RequestError(Fault.BAD_FIELD, msg, code="invalid_http"))

    def _look(self) -> None:
        """Tell the doorway where this connection stands. An unfinished body is silence too: anybody can begin one."""
        between = self.cycle is None or self.cycle.response_complete
        self._doorway.heard(self, silent=between or self.cycle.more_body)
        if not between:
            self._forget_timer()
        elif self.conn.trailing_data[0]:  # the next head has begun; before that, uvicorn's own limit holds
            self._expect_head()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(CLIENT_PATIENCE_SECONDS, self._no_head)

    def _forget_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _keep_pace(self, timer: asyncio.TimerHandle | None) -> None:
        if self._pace_timer is not None:
            self._pace_timer.cancel()
        self._pace_timer = timer

    def _no_head(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            text = f"The request's head did not arrive within {CLIENT_PATIENCE_SECONDS:g} seconds."
            self._refuse(RequestError(Fault.SLOW_BODY, text, code="head_timeout"))
        else:
            self.transport.close()

    def _refuse(self, error: RequestError) -> None:
        """Answer without a request, and close."""
        reply = error_response(error)
        headers = [*reply.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=reply.status_code, headers=headers),
            h11.Data(data=bytes(reply.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
