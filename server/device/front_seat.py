"""One front of a shared engine, as the engine's door knows it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

from msgspec import structs

from server.core.card import TeacherBaseline
from server.core.messages import Baselines, Ended, Hello, Lost, Message, Pixels, Ready
from server.core.work import Work

_REMEMBERED = 64


class FrontSeat:
    """See the module.

    Hosts' monotonic clocks have nothing in common. What a message took to come here, and what it waited to be read,
    only ever makes the clocks look further apart: so the least difference of the last messages is the best.

    Args:
        hello: with which it came.

    Attributes:
        frames: what is to be sent to it next.
        work: its requests, and how many pictures of each are still to be made.
    """

    def __init__(self, hello: Hello) -> None:
        self.name = hello.front
        self.frames: list[bytes | memoryview] = []
        self.work: dict[str, int] = {}
        self._ahead = deque([time.monotonic() - hello.now], maxlen=_REMEMBERED)

    def owns(self, request_id: str) -> bool:
        """Whether a request is one of its."""
        return request_id in self.work

    def take(self, work: Work) -> Work:
        """Note a request; return it by this host's clock."""
        missing = len(work.seeds) - len(work.done)
        if missing:
            self.work[work.id] = missing
        self._ahead.append(time.monotonic() - work.arrived)
        ahead = min(self._ahead)
        return structs.replace(work, arrived=work.arrived + ahead, deadline=work.deadline + ahead)

    def told(self, message: Message) -> None:
        """Note what was said of one of its requests."""
        if isinstance(message, Pixels) and message.number < 0:
            self.work[message.id] -= 1
        if isinstance(message, Lost) or (isinstance(message, Pixels) and not self.work[message.id]):
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
