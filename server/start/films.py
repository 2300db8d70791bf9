"""Video jobs for the models that make films: where they are kept, and how requests become films."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from server.core.card import ModelCard, step_costs
from server.films.maker import FilmMaker, JobLimits
from server.films.runner import JobRunner
from server.films.shelf import FilmShelf
from server.films.store import JobStore
from server.films.tables import CARRIER, VideoJob
from server.front.generation import GenerationSpec, of_model
from server.front.media import encode_film, encode_spritesheet, encode_thumbnail
from server.front.service import Service
from server.http.replies import report
from server.http.resolve import choose_model, resolve_film
from server.http.schemas import VideoRequest

log = logging.getLogger("rmd.server")


def open_jobs(service: Service, cards: Sequence[ModelCard]) -> JobRunner:
    """Open the jobs in the server's database.

    Args:
        cards: of the models that make films; the first is the one that is meant where none is named.

    Raises:
        ValueError, OSError: they cannot be used; the message says why.
    """
    settings, card = service.settings, cards[0]
    default = card.schedules[card.default]
    places = {each.model_id: each.place for each in cards}

    def prepare(request: Mapping[str, Any]) -> GenerationSpec:
        asked = dict(request)
        carrier = asked.pop(CARRIER, {})
        body = VideoRequest.model_validate(asked)
        spec = resolve_film(body, choose_model(body.model, service, films=True), settings)
        return replace(spec, carrier=tuple(carrier.items()))

    def ended(job: VideoJob, outcome: str) -> None:
        label = of_model(places.get(job.model, ""), str(job.request["schedule"]))
        seconds = time.time() - job.created_at
        service.metrics.video_ended(job.model, label, outcome, seconds)
        trace = str(job.request.get(CARRIER, {}).get("traceparent", "")).split("-")
        facts = {
            "request_id": job.id,
            "model": job.model,
            "schedule": str(job.request["schedule"]),
            "outcome": outcome,
            "seconds": round(seconds, 3),
            **({"trace_id": trace[1]} if len(trace) == 4 else {}),
        }
        log.info("film %s %s after %.1f s", job.id, outcome, seconds, extra={"facts": facts})

    _rehearse()
    return JobRunner(
        JobStore(service.database),
        FilmShelf(service.objects),
        FilmMaker(
            prepare=prepare,
            submit=service.submit,
            cancel=service.cancel,
            report=lambda generation, film: report(
                service.card(generation.spec.model), generation, [film]
            ).model_dump(),
            ended=ended,
        ),
        list(places),
        JobLimits(
            queue=settings.video_queue,
            together=settings.videos_together,
            seconds=settings.video_seconds,
            bytes=int(settings.video_gigabytes * 1e9),
            share=settings.share,
        ),
        step_costs(service.costs, default.cascade, default.lane, model=card.place)[0],
    )


def _rehearse() -> None:
    """Encode a film, so that all libraries are in: with no descriptor left none could be loaded any more."""
    blank = np.zeros((1, 16, 16, 3), np.uint8)
    encode_film(blank, 1)
    encode_thumbnail(blank)
    encode_spritesheet(blank)
