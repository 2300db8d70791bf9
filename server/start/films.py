"""Video jobs for a model that makes films: where they are kept, and how requests become films."""

from __future__ import annotations

import time

from server.core.card import ModelCard, step_costs
from server.films.runner import FilmMaker, JobLimits, JobRunner
from server.films.shelf import FilmShelf
from server.films.store import JobStore
from server.front.service import Service
from server.http.replies import report
from server.http.resolve import resolve_film
from server.http.schemas import VideoRequest


def open_jobs(service: Service, card: ModelCard) -> JobRunner:
    """Open the shelf and the database.

    Raises:
        ValueError, OSError: they cannot be used; the message says why.
    """
    settings = service.settings
    default = card.schedules[card.default]
    shelf = FilmShelf(settings.videos)  # first: it makes the folder that the database lies in
    return JobRunner(
        JobStore(settings.video_database_url),
        shelf,
        FilmMaker(
            prepare=lambda request: resolve_film(VideoRequest.model_validate(request), service.card, settings),
            submit=service.submit,
            cancel=service.cancel,
            report=lambda generation, film: report(service.card, generation, [film]).model_dump(),
            ended=lambda job, outcome: service.metrics.video_ended(
                str(job.request["schedule"]), outcome, time.time() - job.created_at
            ),
        ),
        card.model_id,
        JobLimits(
            queue=settings.video_queue,
            together=settings.videos_together,
            seconds=settings.video_seconds,
            bytes=int(settings.video_gigabytes * 1e9),
        ),
        step_costs(service.costs, default.cascade, default.lane)[0],
    )
