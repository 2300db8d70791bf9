"""From the executor's threads to one coroutine."""

from __future__ import annotations

import asyncio
import contextlib

from server.core.request import Event, Failed, Generation
from server.device.executor import deadline_error
from server.front.service import Service
from server.http.errors import ApiError

_GRACE_SECONDS = 2.0


class EventChannel:
    """A generation's events on the event loop that made the channel."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def send(self, event: Event) -> None:
        """Deliver an event; called from any thread, never blocks."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self, patience: float) -> Event | None:
        """Return the next event, or None after ``patience`` seconds.

        Raises:
            ApiError: the generation has failed.
        """
        try:
            # Not wait_for: before Python 3.12 it may swallow the cancellation by which a departed client ends the work.
            async with asyncio.timeout(patience):
                event = await self._queue.get()
        except TimeoutError:
            return None
        if isinstance(event, Failed):
            raise event.error
        return event


async def next_event(service: Service, generation: Generation, channel: EventChannel, patience: float) -> Event | None:
    """Return the next event, or None after ``patience`` seconds without one.

    The executor checks deadlines at every step; should one step alone outlast the deadline, the client still gets
    its 504 here, a little later, and the work is dropped at the next hand-over.

    Raises:
        ApiError: the generation failed or is late.
    """
    left = generation.seconds_left() + _GRACE_SECONDS
    event = await channel.next(min(max(left, 0.0), patience))
    if event is None and generation.seconds_left() < -_GRACE_SECONDS:
        error: ApiError = deadline_error()
        service.cancel(generation, error)
        raise error
    return event
