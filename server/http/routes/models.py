"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.core.card import ModelCard, Schedule, step_costs, text_cost
from server.core.costs import CostTable
from server.front.service import Service
from server.http.resolve import film_seconds, plane, unknown_model
from server.http.schemas import ErrorReply, ModelEntry, ModelList

router = APIRouter(prefix="/v1/models", tags=["models"])


_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorReply} for status in (401, 403, 404, 503)}


def _entry(model: ModelCard, costs: CostTable, name: str) -> ModelEntry:
    return ModelEntry(
        id=name,
        created=model.created,
        rmd={
            "default_schedule": model.default,
            "schedules": {
                name: {
                    "stages": [{"size": str(stage.size), "steps": len(stage.steps)} for stage in s.cascade.stages],
                    "guidance_scale": s.cascade.guidance_scale if s.guided else None,
                    "size": plane(s.cascade.full_size),
                    "expected_seconds": round(_expected_seconds(s, costs, model.place), 6),
                    **({"note": s.cascade.note} if s.cascade.note else {}),
                }
                for name, s in model.schedules.items()
            },
            "sizes": [plane(size) for size in model.sizes],
            "media": model.media,
            "text_tokens": model.text_limit,
            "executor": model.executor_of(model.schedules[model.default].cascade, model.schedules[model.default].lane),
            "compiled": {label: list(buckets) for label, buckets in model.compiled.items()},
            **_film_facts(model),
        },
    )


def _expected_seconds(schedule: Schedule, costs: CostTable, place: str) -> float:
    """Return the work on one picture or film in an empty house, by what batches cost here now; packaging left out."""
    return text_cost(costs, model=place) + step_costs(costs, schedule.cascade, schedule.lane, model=place)[0]


def _film_facts(model: ModelCard) -> dict[str, Any]:
    """Return what a film's request may ask of the frames; nothing where the model makes pictures."""
    if not model.films:
        return {}
    fps = model.frames_per_second
    frames = model.schedules[model.default].cascade.full_size.num_frames
    return {"num_frames": frames, "fps": fps, "seconds": film_seconds(frames, fps)}


def _named(service: Service) -> dict[str, ModelCard]:
    """Return the models by all their names. An alias of no model in particular shows the first one."""
    own = {card.model_id: card for card in service.cards}
    first = next(iter(own))
    aliases = {alias: own.get(model or first) for alias, model in service.settings.aliases.items()}
    return {**own, **{alias: card for alias, card in aliases.items() if card is not None}}


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.get("", response_model=ModelList, responses=_ERRORS)
@router.head("", include_in_schema=False)
async def list_models(request: Request) -> ModelList:
    """List the models this server holds, in the order of its checkpoints, then their further names."""
    service = _service(request)
    return ModelList(data=[_entry(card, service.costs, name) for name, card in _named(service).items()])


@router.get("/{model_id:path}", response_model=ModelEntry, responses=_ERRORS)
@router.head("/{model_id:path}", include_in_schema=False)
async def get_model(model_id: str, request: Request) -> ModelEntry:
    """Describe one model; 404 for any other name."""
    service = _service(request)
    model = _named(service).get(model_id)
    if model is None:
        raise unknown_model(model_id, service)
    return _entry(model, service.costs, model_id)
