"""From a well-formed request to what the served models can do, or the error that names the field."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Sequence

from rmd.cascade import Cascade
from rmd.fields import LARGEST_SEED
from rmd.size import Size
from server.core.card import ModelCard, Schedule
from server.core.faults import Fault, RequestError
from server.front.generation import GenerationSpec
from server.front.media import OutputFormat
from server.front.service import Service
from server.http.schemas import GenerationRequest, ImageRequest, VideoRequest
from server.start.settings import ServerSettings

_SECONDS_TOLERANCE = 0.5
_SIZE = re.compile(r"[1-9]\d{0,4}x[1-9]\d{0,4}")


def choose_model(name: str | None, service: Service, films: bool) -> ModelCard:
    """Return the model a request names, by an alias perhaps, or the first that makes what its route is for.

    Raises:
        RequestError: 503 while they are loading, 404 for a model that is not served, 400 for one that makes the other.
    """
    name = service.settings.aliases.get(name or "", name)
    cards = service.cards
    fitting = [card for card in cards if card.films == films]
    model = next((card for card in (cards if name else fitting) if name in (None, "", card.model_id)), None)
    if model is None and name:
        raise unknown_model(name, service)
    if model is None or model.films != films:
        makes = f"'{(model or cards[0]).model_id}' makes"
        if films:
            raise _bad("model", f"{makes} pictures; use /v1/images/generations.", code="model_makes_pictures")
        raise _bad("model", f"{makes} films; use /v1/videos.", code="model_makes_films")
    return model


def resolve(body: ImageRequest, model: ModelCard, settings: ServerSettings) -> GenerationSpec:
    """Check a request for pictures against the model and the limits.

    Raises:
        RequestError: 400 or 413 that names the field and the way out.
    """
    _check_texts(body, settings)
    n = body.n or 1
    if n > settings.max_images:
        raise _bad("n", f"n is {n}; one request draws at most {settings.max_images} pictures.")
    schedule = _schedule(body, model, settings.nearest_size)
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    return GenerationSpec(
        prompt=body.prompt,
        schedule=schedule.name,
        cascade=_changed(body, schedule),
        lane=schedule.lane,
        model=model.place,
        seeds=tuple((seed + i) % (LARGEST_SEED + 1) for i in range(n)),
        negative_prompt=body.negative_prompt or "",
        guidance_scale=body.guidance_scale,
        noise_intensity=body.noise_intensity,
        partial_images=_partial_images(body),
        base64=body.response_format != "url",
        output_format=_output_format(body),
        output_compression=body.output_compression,
        metadata=(("Software", "rmd"), ("rmd:model", model.model_id), ("rmd:schedule", schedule.name)),
    )


def resolve_film(body: VideoRequest, model: ModelCard, settings: ServerSettings) -> GenerationSpec:
    """Check a request for a film against the model and the limits.

    Raises:
        RequestError: 400 or 413 that names the field and the way out.
    """
    _check_texts(body, settings)
    if body.input_reference is not None:
        raise _bad("input_reference", f"'{model.model_id}' draws from text alone; leave input_reference out.")
    schedule = _schedule(body, model, settings.nearest_size)
    frames = schedule.cascade.full_size.num_frames
    if body.num_frames not in (None, frames):
        raise _bad("num_frames", f"schedule '{schedule.name}' makes {frames} frames, not {body.num_frames}.")
    fps = body.fps or model.frames_per_second
    seconds = film_seconds(frames, fps)
    if body.seconds is not None and abs(float(body.seconds) - float(seconds)) > _SECONDS_TOLERANCE:
        raise _bad(
            "seconds",
            f"films have {frames} frames, {seconds} seconds at {fps} a second; ask for that or nothing.",
        )
    return GenerationSpec(
        prompt=body.prompt,
        schedule=schedule.name,
        cascade=_changed(body, schedule),
        lane=schedule.lane,
        model=model.place,
        seeds=(secrets.randbelow(2**32) if body.seed is None else body.seed,),
        negative_prompt=body.negative_prompt or "",
        guidance_scale=body.guidance_scale,
        noise_intensity=body.noise_intensity,
        frames_per_second=fps,
    )


def film_seconds(frames: int, frames_per_second: int) -> str:
    """Return a film's length as the wire has it: seconds, at most two decimals."""
    return f"{round(frames / frames_per_second, 2):g}"


def plane(size: Size) -> str:
    """Return "WIDTHxHEIGHT": the wire's sizes say nothing of frames."""
    return f"{size.width}x{size.height}"


def unknown_model(name: str, service: Service) -> RequestError:
    """Return the 404 for a model that is not served here."""
    held = ", ".join(f"'{card.model_id}'" for card in service.cards)
    why = " could not be loaded (see /health/ready)" if name in service.missing else " is not served here"
    return RequestError(
        Fault.NOT_FOUND,
        f"The model '{name[:80]}'{why}; this server holds {held}.",
        param="model",
        code="model_not_found",
    )


def _check_texts(body: GenerationRequest, settings: ServerSettings) -> None:
    for name, text in (("prompt", body.prompt), ("negative_prompt", body.negative_prompt)):
        if text is not None and len(text) > settings.max_prompt_characters:
            raise RequestError(
                Fault.TOO_LARGE,
                f"{name} has {len(text)} characters; at most {settings.max_prompt_characters} are taken.",
                param=name,
                code="string_above_max_length",
            )


def _bad(param: str, message: str, code: str | None = None) -> RequestError:
    return RequestError(Fault.BAD_FIELD, message, param=param, code=code)


def _schedule(body: GenerationRequest, model: ModelCard, nearest: bool) -> Schedule:
    """Find the schedule by name and size; a size alone picks the default or the first schedule that ends in it.

    Args:
        nearest: take another size for the nearest one that the schedule, or any, draws.
    """
    size = None if body.size == "auto" else body.size
    sizes = [plane(offered) for offered in model.sizes]
    named = model.schedules.get(body.schedule or "")
    if nearest and size is not None and _SIZE.fullmatch(size):
        size = _nearest(size, [plane(named.cascade.full_size)] if named else sizes)
    if size is not None and size not in sizes:
        raise _bad("size", f"size '{size[:32]}' is not offered; choose one of {', '.join(sizes)} or 'auto'.")
    if body.schedule is not None:
        found = named
        if found is None:
            names = ", ".join(model.schedules)
            raise _bad("schedule", f"schedule '{body.schedule[:40]}' is not offered; choose one of {names}.")
        if size not in (None, plane(found.cascade.full_size)):
            raise _bad("size", f"schedule '{found.name}' draws {plane(found.cascade.full_size)}, not {size}.")
        return found
    candidates = [model.schedules[model.default], *model.schedules.values()]
    return next(s for s in candidates if size in (None, plane(s.cascade.full_size)))


def _nearest(size: str, offered: Sequence[str]) -> str:
    """Return the offered size whose shape, and then whose area, is least far from ``size`` ("WIDTHxHEIGHT")."""
    width, height = map(int, size.split("x"))

    def distance(other: str) -> tuple[float, float]:
        w, h = map(int, other.split("x"))
        return abs(math.log(w * height / (h * width))), abs(math.log(w * h / (width * height)))

    return min(offered, key=distance)


def _check_changes(body: GenerationRequest, schedule: Schedule) -> None:
    """Refuse to change of a schedule what it does not have."""
    for name in ("guidance_scale", "negative_prompt"):
        if getattr(body, name) not in (None, "") and not schedule.guided:
            raise _bad(
                name,
                f"{name} has no effect on schedule '{schedule.name}', whose guidance is distilled in; leave it out.",
            )
    if body.noise_intensity is not None and not schedule.hands_over:
        raise _bad(
            "noise_intensity",
            f"noise_intensity has no effect on schedule '{schedule.name}', which has one stage; leave it out.",
        )


def _changed(body: GenerationRequest, schedule: Schedule) -> Cascade:
    _check_changes(body, schedule)
    return schedule.changed(body.guidance_scale, body.noise_intensity)


def _partial_images(body: ImageRequest) -> int:
    return (body.partial_images or 0) if body.stream else 0


def _output_format(body: ImageRequest) -> OutputFormat:
    chosen: OutputFormat = body.output_format or "png"
    if chosen == "png" and body.output_compression not in (None, 100):
        raise _bad("output_compression", "PNG is lossless: ask for output_format 'jpeg' or 'webp', or leave this out.")
    if body.stream and body.response_format == "url":
        raise _bad("response_format", "Streamed pictures travel as b64_json; leave response_format out.")
    return chosen
