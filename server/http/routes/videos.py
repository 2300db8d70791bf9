"""``/v1/videos``: jobs, their films, and what becomes of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, Response

from server.core.card import step_costs
from server.core.faults import Fault, RequestError
from server.films.shelf import FILM, MEDIA_TYPES, SPRITESHEET, THUMBNAIL, film_object
from server.films.tables import CARRIER, VideoJob
from server.front.service import Service
from server.http.errors import validation_error
from server.http.keys import caller_of
from server.http.resolve import choose_model, film_seconds, plane, resolve_film
from server.http.routes.images import check_idempotency_key
from server.http.schemas import (
    ErrorReply,
    RemixRequest,
    Video,
    VideoDeleted,
    VideoError,
    VideoList,
    VideoRequest,
)
from server.http.stored import kept_reply
from server.telemetry.facts import CURRENT

router = APIRouter(prefix="/v1/videos", tags=["videos"])

Body = TypeVar("Body", bound=BaseModel)
Variant = Literal["video", "thumbnail", "spritesheet"]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorReply} for status in (400, 401, 403, 404, 500, 503, *statuses)}


_MAKING, _LOOKING, _FETCHING = _errors(408, 409, 413, 429), _errors(), _errors(409, 412, 416)
_VARIANTS: dict[Variant, str] = {"video": FILM, "thumbnail": THUMBNAIL, "spritesheet": SPRITESHEET}
_MOST_FIELDS = 32
_POLLS_A_FILM = 20
_POLL_BOUNDS_MS = (250, 10_000)


def _body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Document a body that the route reads by itself, since it may be JSON or a form."""
    schema = {"schema": model.model_json_schema()}
    content = {"multipart/form-data": schema, "application/json": schema}
    return {"requestBody": {"required": True, "content": content}}


@router.post("", response_model=Video, responses=_MAKING, openapi_extra=_body_schema(VideoRequest))
async def create_video(request: Request) -> Response:
    """Take a job; its film is made as soon as its turn comes, also after a restart."""
    service: Service = request.app.state.service
    service.check_accepting()
    body = await _read(request, VideoRequest)
    return await _accept(request, body, lambda: _new_job(service, body, _account(request)))


@router.post("/{video_id}/remix", response_model=Video, responses=_MAKING, openapi_extra=_body_schema(RemixRequest))
async def remix_video(video_id: str, request: Request) -> Response:
    """Take a job like a finished one, from the same noise, for another prompt."""
    service: Service = request.app.state.service
    service.check_accepting()
    body = await _read(request, RemixRequest)

    def new() -> VideoJob:
        source = _find(request, video_id)
        if source.status != "completed":
            raise _not_ready(source, "remixed")
        changed = VideoRequest.model_validate({**source.asked, "prompt": body.prompt})
        return _new_job(service, changed, source.account, source.id)

    return await _accept(request, body, new)


@router.get("", response_model=VideoList, responses=_LOOKING)
@router.head("", include_in_schema=False)
def list_videos(
    request: Request,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """List this key's jobs, the newest first unless asked otherwise."""
    service: Service = request.app.state.service
    try:
        page = service.jobs.store.page(_account(request), after, limit, order == "desc", time.time())
    except KeyError:
        raise RequestError(Fault.BAD_FIELD, "There is no such video to list from.", param="after") from None
    videos = [_video(job) for job in page.jobs]
    ends = (videos[0].id, videos[-1].id) if videos else (None, None)
    return VideoList(data=videos, first_id=ends[0], last_id=ends[1], has_more=page.has_more)


@router.get("/{video_id}", response_model=Video, responses=_LOOKING)
@router.head("/{video_id}", include_in_schema=False)
def get_video(video_id: str, request: Request) -> Response:
    """Say how far a job is; ``openai-poll-after-ms`` says when to ask again."""
    service: Service = request.app.state.service
    job = _find(request, video_id)
    headers = {"openai-poll-after-ms": str(_poll_after_ms(service, job))} if job.open else {}
    return JSONResponse(_video(job).model_dump(), headers=headers)


@router.get("/{video_id}/content", response_class=Response, responses=_FETCHING)
@router.head("/{video_id}/content", include_in_schema=False)
async def get_content(video_id: str, request: Request, variant: Variant = "video") -> Response:
    """Return the film (MP4), its middle frame (WebP) or a sheet of its frames (JPEG). Takes Range requests."""
    service: Service = request.app.state.service
    job = await asyncio.to_thread(_find, request, video_id)
    if job.status != "completed":
        raise _not_ready(job, "fetched")
    name = _VARIANTS[variant]
    try:
        return await kept_reply(
            service.objects,
            await service.objects.head(film_object(job.id, name)),
            request,
            media_type=MEDIA_TYPES[name],
            seconds_left=(job.expires_at or 0.0) - time.time(),
            filename=f"{job.id}.{name.partition('.')[2]}",
            presigned_seconds=service.settings.presigned_seconds,
        )
    except FileNotFoundError:  # removed just now, here or by another server
        text = "This film has expired or was deleted; make it again from its prompt and rmd.seed."
        raise RequestError(Fault.NOT_FOUND, text) from None


@router.delete("/{video_id}", response_model=VideoDeleted, responses=_LOOKING)
def delete_video(video_id: str, request: Request) -> VideoDeleted:
    """Delete a finished job and its film; cancel an unfinished one, which then reads ``failed: cancelled``."""
    service: Service = request.app.state.service
    service.jobs.remove(_find(request, video_id))
    return VideoDeleted(id=video_id)


async def _read(request: Request, shape: type[Body]) -> Body:
    """Read a body, JSON or form. OpenAI's client always sends a form, in which numbers are texts."""
    form = request.headers.get("content-type", "").partition(";")[0].strip().lower() in (
        "multipart/form-data",
        "application/x-www-form-urlencoded",
    )
    try:
        if form:
            async with request.form(max_files=1, max_fields=_MOST_FIELDS) as fields:
                given = {name: _file_name(value) for name, value in fields.multi_items()}
            return shape.model_validate(given, strict=False)
        return shape.model_validate_json(await request.body())
    except ValidationError as error:
        raise validation_error([{**item, "loc": ("body", *item["loc"])} for item in error.errors()]) from None


def _file_name(value: UploadFile | str) -> Any:
    return {"file": value.filename} if isinstance(value, UploadFile) else value


async def _accept(request: Request, body: BaseModel, new: Callable[[], VideoJob]) -> Response:
    """Accept a job, or return the one that an earlier request with the same Idempotency-Key made."""
    jobs = request.app.state.service.jobs
    key, digest = request.headers.get("idempotency-key"), ""
    if key is not None:
        check_idempotency_key(key)
        # Of the values, not of the bytes: a form's boundary differs each time it is sent.
        told = f"{request.url.path} {json.dumps(body.model_dump(), sort_keys=True)}"
        digest = hashlib.sha256(told.encode()).hexdigest()

    def accept() -> tuple[VideoJob, bool]:
        earlier = None if key is None else jobs.earlier(_account(request), key, digest)
        if earlier is not None:
            return earlier, True
        job = new()
        if key is not None:
            job.idempotency_key, job.body_digest = key, digest
        kept = jobs.accept(job)
        return kept, kept is not job

    job, replayed = await asyncio.to_thread(accept)
    return JSONResponse(_video(job).model_dump(), headers={"Idempotent-Replayed": "true"} if replayed else None)


def _new_job(service: Service, body: VideoRequest, account: str, remixed_from: str | None = None) -> VideoJob:
    """Check a request and write out all that its film depends on.

    Raises:
        RequestError: 400, 404 or 413, naming the field.
    """
    model = choose_model(body.model, service, films=True)
    spec = resolve_film(body, model, service.settings)
    assert spec.frames_per_second is not None
    service.check_possible(spec)
    fixed: Mapping[str, Any] = {
        "model": model.model_id,
        "schedule": spec.schedule,
        "seed": spec.seeds[0],
        "fps": spec.frames_per_second,
    }
    size = spec.cascade.full_size
    return VideoJob(
        account=account,
        model=model.model_id,
        request={**body.model_dump(exclude_none=True), **fixed, **_trace()},
        seconds=film_seconds(size.num_frames, spec.frames_per_second),
        size=plane(size),
        created_at=time.time(),
        remixed_from=remixed_from,
    )


def _trace() -> dict[str, Any]:
    facts = CURRENT.get()
    return {} if facts is None or facts.span is None else {CARRIER: facts.span.carrier()}


def _account(request: Request) -> str:
    return caller_of(request).account


def _find(request: Request, video_id: str) -> VideoJob:
    service: Service = request.app.state.service
    job = service.jobs.store.get(_account(request), video_id[:64], time.time())
    if job is None:
        raise RequestError(Fault.NOT_FOUND, "There is no such video: it was deleted, has expired, or never was.")
    return job


def _not_ready(job: VideoJob, wanted: str) -> RequestError:
    if job.open:
        return RequestError(
            Fault.CONFLICT,
            f"The video is {job.status} and cannot be {wanted} yet; poll it until it is completed.",
            code="video_not_ready",
        )
    return RequestError(Fault.NOT_FOUND, f"The video failed ({job.error_code}): there is nothing to be {wanted}.")


def _poll_after_ms(service: Service, job: VideoJob) -> int:
    """Return a twentieth of the film's expected work, within bounds; the upper one where nobody here makes it."""
    card = next((card for card in service.cards if card.model_id == job.model), None)
    schedule = card.schedules.get(str(job.request.get("schedule"))) if card else None
    least, most = _POLL_BOUNDS_MS
    if card is None or schedule is None:
        return most
    seconds = step_costs(service.costs, schedule.cascade, schedule.lane, model=card.place)[0]
    return int(min(max(1000 * seconds / _POLLS_A_FILM, least), most))


def _video(job: VideoJob) -> Video:
    request = job.request
    failed = job.status == "failed"
    # Its server ended, and nobody has taken it up: it waits, for ever perhaps, if its model is no longer served.
    left = job.status == "in_progress" and job.left
    return Video(
        id=job.id,
        model=job.model,
        status="queued" if left else job.status,
        progress=0 if left else job.progress,
        created_at=int(job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=None if job.expires_at is None else int(job.expires_at),
        seconds=job.seconds,
        size=job.size,
        prompt=request["prompt"],
        remixed_from_video_id=job.remixed_from,
        error=VideoError(code=job.error_code or "", message=job.error_message or "") if failed else None,
        rmd={"schedule": request["schedule"], "seed": request["seed"], "fps": request["fps"], **(job.report or {})},
    )
