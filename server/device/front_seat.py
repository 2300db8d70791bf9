"""One front of a shared engine, as the engine's door knows it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

from msgspec import structs

from server.core.card import TeacherBaseline
from server.core.messages import Baselines, Ended, HandedOver, Hello, Lost, Message, Pixels, Ready, Submit

_REMEMBERED = 64


class FrontSeat:
    """See the module.

    Hosts' monotonic clocks have nothing in common. What a message took to come here, and what it waited to be read,
    only ever makes the clocks look further apart: so the least difference of the last messages is the best.

    Args:
        hello: with which it came.

    Attributes:
        frames: what is to be sent to it next.
        work: its requests, and what is still to come of each: (picture, number of a partial one that was handed over).
    """

    def __init__(self, hello: Hello) -> None:
        self.name = hello.front
        self.frames: list[bytes | memoryview] = []
        self.work: dict[str, set[tuple[int, int]]] = {}
        self._ahead = deque([time.monotonic() - hello.now], maxlen=_REMEMBERED)

    def owns(self, request_id: str) -> bool:
        """Whether a request is one of its."""
        return request_id in self.work

    def take(self, command: Submit) -> Submit:
        """Note a request, or more of one; return it by this host's clock."""
        work, now = command.work, time.monotonic()
        coming = {(index, -1) for index in range(len(work.seeds)) if index not in work.done}
        coming.update((state.index, state.number) for state in command.states)
        if coming:
            self.work.setdefault(work.id, set()).update(coming)
        self._ahead.append(now - (command.sent or work.arrived))
        ahead = min(self._ahead)
        work = structs.replace(work, arrived=work.arrived + ahead, deadline=work.deadline + ahead)
        return structs.replace(command, work=work)

    def told(self, message: Message) -> None:
        """Note what was said of one of its requests."""
        if isinstance(message, Lost):
            del self.work[message.id]
        elif isinstance(message, Pixels | HandedOver):
            told = message if isinstance(message, Pixels) else message.state
            self.work[message.id].discard((told.index, told.number))
            if not self.work[message.id]:
                del self.work[message.id]

    def version(self, message: Message, counts: bool = True) -> Message:
        """Return a message as this front has to hear it: by its own clock.

        Args:
            counts: of the end of a batch: it goes into this front's metrics and costs. One front's only, so that sums
                over fronts are right.
        """
        if isinstance(message, Ended) and not counts:
            return structs.replace(message, rows=0, failed="")
        if isinstance(message, Baselines):
            return structs.replace(message, baselines=self._timed(message.baselines))
        if isinstance(message, Ready):
            cards = tuple(replace(card, baselines=self._timed(card.baselines)) for card in message.cards)
            return structs.replace(message, cards=cards)
        return message

    def _timed(self, baselines: tuple[TeacherBaseline, ...]) -> tuple[TeacherBaseline, ...]:
        return tuple(structs.replace(each, measured=each.measured - min(self._ahead)) for each in baselines)
