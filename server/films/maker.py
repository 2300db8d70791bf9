"""What a runner of video jobs is told: its bounds, and what makes the films."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from server.core.faults import RequestError
from server.films.tables import VideoJob
from server.front.generation import Event, FinishedPicture, Generation, GenerationSpec


@dataclass(frozen=True)
class JobLimits:
    """Bounds of the jobs.

    Attributes:
        queue: jobs that may wait or be worked on at once.
        share: of them, that may be one account's.
        together: jobs given to the executor at once, which batches them by stage.
        seconds: how long a finished film is kept, and a job waits to be begun at most.
        bytes: of all films of the served models; the oldest leave first.
    """

    queue: int
    together: int
    seconds: float
    bytes: int
    share: float = 1.0


@dataclass(frozen=True)
class FilmMaker:
    """What the runner asks of the service.

    Attributes:
        prepare: from a job's stored request to a spec. Raises RequestError where the served model cannot do it.
        submit: admit a spec; its events go to the sink. Raises RequestError where it is not taken now.
        cancel: end a generation early.
        report: the ``rmd`` object of a finished film.
        ended: told of a job that ended, and of its outcome as the metrics call it.
    """

    prepare: Callable[[Mapping[str, Any]], GenerationSpec]
    submit: Callable[[GenerationSpec, Callable[[Event], None], str], Generation]
    cancel: Callable[[Generation, RequestError], None]
    report: Callable[[Generation, FinishedPicture], dict[str, Any]]
    ended: Callable[[VideoJob, str], None] = lambda job, outcome: None
