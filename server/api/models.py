"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

from fastapi import APIRouter, Request

from server.api.schemas import ModelEntry, ModelList
from server.errors import ApiError, Fault
from server.model import ServedModel
from server.service import Service

router = APIRouter(prefix="/v1/models", tags=["models"])


def _entry(model: ServedModel) -> ModelEntry:
    return ModelEntry(
        id=model.model_id,
        created=model.created,
        rmd={
            "default_schedule": model.default,
            "schedules": {
                name: {
                    "stages": [{"size": str(stage.size), "steps": len(stage.steps)} for stage in s.cascade.stages],
                    "guidance_scale": s.cascade.guidance_scale if s.guided else None,
                    "size": str(s.cascade.full_size),
                }
                for name, s in model.schedules.items()
            },
            "sizes": [str(size) for size in model.sizes],
        },
    )


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.get("", response_model=ModelList)
async def list_models(request: Request) -> ModelList:
    """List the one model this server holds; 503 while it is loading."""
    return ModelList(data=[_entry(_service(request).model)])


@router.get("/{model_id:path}", response_model=ModelEntry)
async def get_model(model_id: str, request: Request) -> ModelEntry:
    """Describe one model; 404 for any other name."""
    model = _service(request).model
    if model_id != model.model_id:
        raise unknown_model(model_id, model)
    return _entry(model)


def unknown_model(name: str, model: ServedModel) -> ApiError:
    """Return the 404 for a model that is not served here."""
    return ApiError(
        Fault.NOT_FOUND,
        f"The model '{name[:80]}' is not served here; this server holds '{model.model_id}'.",
        param="model",
        code="model_not_found",
    )
