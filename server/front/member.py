"""One engine as the front knows it: its state, what it runs now, and what its batches cost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

import zmq

from server.core.card import ModelCard
from server.core.costs import CostTable
from server.core.messages import Baselines, Began, Changed, Ended, Ready
from server.core.running import Running
from server.core.stages import ALL, Stages
from server.front.engine import EngineLink

PING_SECONDS = 2.0
_LOAD_SILENCE_SECONDS = 1800.0
_FAILURES = 5
_FAILURE_WINDOW_SECONDS = 600.0
_LONGEST_PAUSE_SECONDS = 15.0


class Health(Enum):
    """Where an engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    LEAVING = "leaving"
    """It finishes what it has, and is given nothing new."""
    DOWN = "restarting"
    DEAD = "dead"
    """It has ended too often: it is not started again."""


@dataclass(frozen=True)
class WatchLimits:
    """When an engine counts as hung.

    Attributes:
        seconds: least time that a batch, or an answer, may take.
        factor: a batch may take this many times what it should.
    """

    seconds: float = 10.0
    factor: float = 20.0


class Member:
    """One engine of the fleet. Guarded by the fleet's lock.

    Args:
        index: its number.
        device: what it runs on, such as "cuda:0".
        start: starts an engine for it, or finds one that runs.
        limits: see :class:`WatchLimits`.
        enlisted: others start its engine, and say when it is gone for good.

    Attributes:
        start_link: the same ``start``; of an enlisted engine, as it was last told.
        foreign: expected work (seconds) that it has from other fronts.
    """

    def __init__(
        self, index: int, device: str, start: Callable[[], EngineLink], limits: WatchLimits, enlisted: bool = False
    ) -> None:
        self.index, self.device, self.enlisted = index, device, enlisted
        self.start_link, self._limits = start, limits
        self.health = Health.DOWN if enlisted else Health.LOADING
        self.foreign = 0.0
        self.stages: Stages = ALL
        """What it can do; as long as it was never ready, it may be anything."""
        self.link: EngineLink | None = None
        self.cards: dict[str, ModelCard] = {}
        """By place; empty until it was ready once."""
        self.missing: Mapping[str, str] = {}
        self.clock = 0.0
        self.costs = CostTable({})
        self.running = Running()
        self.reason = ""
        self.usage = False
        self.restarts = 0
        self._heard = self._pinged = time.monotonic()
        self._failures: deque[float] = deque(maxlen=_FAILURES)
        self._restart_at = self._excused = 0.0

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start its engine."""
        self.health, self.reason = Health.LOADING, ""
        self.running.clear()
        try:
            self.link = self.start_link()
        except (OSError, ValueError, zmq.ZMQError) as error:  # such as a full disk, or a GPU that is not there
            self.reason, self.usage = f"{type(error).__name__}: {error}", isinstance(error, ValueError)
            self.lost()
        self.heard()

    def lost(self) -> None:
        """Note that its engine has ended; say when it is to be started again, or that it is not."""
        if self.link is not None:
            self.link.close()
        self.link = None
        self.running.clear()
        now = time.monotonic()
        self._failures.append(now)
        often = len(self._failures) == _FAILURES and now - self._failures[0] < _FAILURE_WINDOW_SECONDS
        dead = not self.enlisted and (often or (self.usage and not self.cards))
        self.health = Health.DEAD if dead else Health.DOWN
        pause = min(2.0 ** (len(self._failures) - 2), _LONGEST_PAUSE_SECONDS) if len(self._failures) > 1 else 0.0
        self._restart_at = now + pause

    @property
    def restart_due(self) -> bool:
        """Whether its engine is to be started again now."""
        return self.health is Health.DOWN and time.monotonic() >= self._restart_at

    # -- watching ------------------------------------------------------------------------------------------------------

    def heard(self) -> None:
        """It has said something."""
        self._heard, self._excused = time.monotonic(), 0.0

    def forgive(self, seconds: float) -> None:
        """The whole machine stood still for so long, the front too."""
        self.running.forgive(seconds)
        self._heard += seconds

    def excuse(self, seconds: float) -> None:
        """It has said that nothing will be heard of it for so long."""
        self._excused = seconds

    def ping_due(self) -> bool:
        """Whether it is to be asked for a sign of life; notes that it is."""
        now = time.monotonic()
        if self.health is not Health.READY or self.running.batches or now - self._pinged < PING_SECONDS:
            return False
        self._pinged = now
        return True

    @property
    def batch_seconds(self) -> tuple[float, float]:
        """How long its oldest batch has run, and should take; zeros where none runs."""
        oldest = self.running.oldest
        return (0.0, 0.0) if oldest is None else (oldest[1], oldest[0].expected)

    def hung(self) -> str:
        """Return why its engine counts as hung; nothing where it does not."""
        now = time.monotonic()
        if self.running.batches:
            return self.running.hung(self._limits.seconds, self._limits.factor)
        silent = now - self._heard - self._excused
        limit = _LOAD_SILENCE_SECONDS if self.health is Health.LOADING else self._limits.seconds + PING_SECONDS
        return f"it said nothing for {silent:.0f} s" if silent > limit else ""

    # -- what it says --------------------------------------------------------------------------------------------------

    def ready(self, message: Ready) -> None:
        """Its models are loaded."""
        widths: dict[object, dict[int, float]] = {}
        for key, rows, seconds in message.costs:
            widths.setdefault(key, {})[rows] = seconds
        self.costs = CostTable(widths)  # type: ignore[arg-type]
        self.cards = {card.place: card for card in message.cards}
        self.missing, self.health, self.usage = message.missing, Health.READY, False
        self.clock, self.stages = message.clock, message.stages

    def changed(self, message: Changed) -> None:
        """One of its stations runs on something else."""
        self.costs.replace(message.key, dict(message.costs))
        card = self.cards.get(message.key.model)
        if card is not None:
            self.cards[card.place] = replace(
                card,
                compiled={**card.compiled, message.key.label: message.compiled},
                complete=message.complete,
                executor_kind=message.executor_kind,
                memory_bytes={**card.memory_bytes, **message.memory_bytes},
            )

    def timed_teacher(self, message: Baselines) -> None:
        """A teacher has been timed again."""
        card = self.cards.get(message.model)
        if card is not None:
            self.cards[card.place] = replace(card, baselines=message.baselines)

    def began(self, message: Began) -> None:
        """A batch runs."""
        self.running.note(message)

    def ended(self, message: Ended) -> Began | None:
        """A batch is over; return how it began."""
        if message.rows:
            self.costs.observe(message.key, message.rows * message.tracks, message.seconds)
        return self.running.note(message)

    def time_of(self, message: Ended) -> float:
        """When a batch was over, seconds since 1970: by its engine's clock, or as heard now."""
        return self.clock + message.at if self.clock and message.at else time.time()
