"""From other threads to one coroutine."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from server.core.faults import RequestError, deadline_error
from server.front.generation import Event, Failed, FinishedPicture, Generation, PartialPicture
from server.front.service import Service

_GRACE_SECONDS = 1.5  # the fleet ends a late request before that


@dataclass
class Held:
    """What one connection's client has not read yet, beside what was written to it."""

    bytes: int = 0


class EventChannel:
    """A generation's events on the event loop that made the channel.

    Args:
        held: kept true by what waits here.
    """

    def __init__(self, held: Held | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._held = held or Held()
        self._held.bytes = 0
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def send(self, event: Event) -> None:
        """Deliver an event; called from any thread, never blocks."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        self._held.bytes += _size(event)
        self._queue.put_nowait(event)

    async def next(self, patience: float) -> Event | None:
        """Return the next event, or None after ``patience`` seconds.

        Raises:
            RequestError: the generation has failed.
        """
        try:
            # Not wait_for: before Python 3.12 it may swallow the cancellation by which a departed client ends the work.
            async with asyncio.timeout(patience):
                event = await self._queue.get()
        except TimeoutError:
            return None
        self._held.bytes -= _size(event)
        if isinstance(event, Failed):
            raise event.error
        return event


def _size(event: Event) -> int:
    return len(event.content) + len(event.encoded) if isinstance(event, FinishedPicture | PartialPicture) else 0


async def next_event(service: Service, generation: Generation, channel: EventChannel, patience: float) -> Event | None:
    """Return the next event, or None after ``patience`` seconds without one.

    Deadlines are checked by engines and by the fleet; this is the last resort.

    Raises:
        RequestError: the generation failed or is late.
    """
    left = generation.seconds_left() + _GRACE_SECONDS
    event = await channel.next(min(max(left, 0.0), patience))
    if event is None and generation.seconds_left() < -_GRACE_SECONDS:
        error: RequestError = deadline_error()
        service.cancel(generation, error)
        raise error
    return event
