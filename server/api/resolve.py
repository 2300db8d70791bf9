"""From a well-formed request to what the served model can do, or the error that names the field."""

from __future__ import annotations

import secrets
from dataclasses import replace

from rmd.cascade import Cascade
from rmd.size import Size
from server.api.models import unknown_model
from server.api.schemas import LARGEST_SEED, ImageRequest
from server.errors import ApiError, Fault
from server.media import OutputFormat
from server.model import Schedule, ServedModel
from server.scheduling.request import GenerationSpec
from server.settings import ServerSettings


def resolve(body: ImageRequest, model: ServedModel, settings: ServerSettings) -> GenerationSpec:
    """Check a request against the model and the limits.

    Raises:
        ApiError: 400, 404 or 413 that names the field and the way out.
    """
    if body.model not in (None, "", model.model_id):
        raise unknown_model(str(body.model), model)
    for name, text in (("prompt", body.prompt), ("negative_prompt", body.negative_prompt)):
        if text is not None and len(text) > settings.max_prompt_characters:
            raise ApiError(
                Fault.TOO_LARGE,
                f"{name} has {len(text)} characters; at most {settings.max_prompt_characters} are taken.",
                param=name,
                code="string_above_max_length",
            )
    n = body.n or 1
    if n > settings.max_images:
        raise _bad("n", f"n is {n}; one request draws at most {settings.max_images} pictures.")
    schedule = _schedule(body, model)
    cascade = _cascade(body, schedule)
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    return GenerationSpec(
        prompt=body.prompt,
        schedule=schedule.name,
        cascade=cascade,
        lane=schedule.lane,
        seeds=tuple((seed + i) % (LARGEST_SEED + 1) for i in range(n)),
        negative_prompt=body.negative_prompt or "",
        partial_images=_partial_images(body),
        output_format=_output_format(body),
        output_compression=body.output_compression,
        metadata=(("Software", "rmd"), ("rmd:model", model.model_id), ("rmd:schedule", schedule.name)),
    )


def _bad(param: str, message: str, code: str | None = None) -> ApiError:
    return ApiError(Fault.BAD_FIELD, message, param=param, code=code)


def _schedule(body: ImageRequest, model: ServedModel) -> Schedule:
    """Find the schedule by name and size; a size alone picks the default or the first schedule that ends in it."""
    size = _size(body.size, model)
    if body.schedule is not None:
        found = model.schedules.get(body.schedule)
        if found is None:
            names = ", ".join(model.schedules)
            raise _bad("schedule", f"schedule '{body.schedule[:40]}' is not offered; choose one of {names}.")
        if size not in (None, found.cascade.full_size):
            raise _bad("size", f"schedule '{found.name}' draws {found.cascade.full_size}, not {size}.")
        return found
    candidates = [model.schedules[model.default], *model.schedules.values()]
    return next(s for s in candidates if size in (None, s.cascade.full_size))


def _size(text: str | None, model: ServedModel) -> Size | None:
    if text is None or text == "auto":
        return None
    try:
        size = Size.parse(text) if len(text) <= 32 else None
    except ValueError:
        size = None
    if size not in model.sizes:
        sizes = ", ".join(map(str, model.sizes))
        raise _bad("size", f"size '{text[:32]}' is not offered; choose one of {sizes} or 'auto'.")
    return size


def _cascade(body: ImageRequest, schedule: Schedule) -> Cascade:
    cascade = schedule.cascade
    for name in ("guidance_scale", "negative_prompt"):
        if getattr(body, name) not in (None, "") and not schedule.guided:
            raise _bad(
                name,
                f"{name} has no effect on schedule '{schedule.name}', whose guidance is distilled in; leave it out.",
            )
    if body.noise_intensity is not None:
        if not schedule.hands_over:
            raise _bad(
                "noise_intensity",
                f"noise_intensity has no effect on schedule '{schedule.name}', which has one stage; leave it out.",
            )
        cascade = replace(cascade, transition_noise_intensity=body.noise_intensity)
    if body.guidance_scale is not None:
        cascade = replace(cascade, guidance_scale=body.guidance_scale)
    return cascade


def _partial_images(body: ImageRequest) -> int:
    return (body.partial_images or 0) if body.stream else 0


def _output_format(body: ImageRequest) -> OutputFormat:
    chosen: OutputFormat = body.output_format or "png"
    if chosen == "png" and body.output_compression not in (None, 100):
        raise _bad("output_compression", "PNG is lossless: ask for output_format 'jpeg' or 'webp', or leave this out.")
    if body.stream and body.response_format == "url":
        raise _bad("response_format", "Streamed pictures travel as b64_json; leave response_format out.")
    return chosen
