"""The shapes on the wire. Types and ranges only; what depends on the served model is checked in the route."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from rmd.fields import LARGEST_SEED

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]


def _encodable(value: str | None) -> str | None:
    """Refuse lone surrogates, which JSON can carry, no tokenizer can read and no reply can quote."""
    if value is not None:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise PydanticCustomError("unicode_text", "Input should be valid Unicode text") from None
    return value


def _not_empty(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("empty_prompt", "Input should not be empty: say what to draw")
    return value


class GenerationRequest(BaseModel):
    """What pictures and films have in common: OpenAI's fields, then ours."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(description="What to draw.")
    model: str | None = Field(None, description="A model id from /v1/models; none: the one this server holds.")
    size: str | None = Field(None, description='"WIDTHxHEIGHT" of the model\'s sizes, or "auto".')
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = Field(
        None, description="The same request with the same seed gives the same picture. Drawn at random if absent."
    )
    negative_prompt: str | None = Field(None, description="Guided schedules only.")
    schedule: str | None = Field(None, description='Steps per stage, such as "2+2", or "teacher".')
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="Guided schedules only; students have theirs distilled in."
    )
    noise_intensity: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Share of predicted noise at a change of resolution; schedules of several stages only."
    )

    @field_validator("guidance_scale", "noise_intensity", mode="before")
    @classmethod
    def _finite_number(cls, value: Any) -> Any:
        """JSON has no integers of its own: 3 is a fine 3.0. NaN and Infinity are not numbers to compute with."""
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**6:
            return float(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise PydanticCustomError("finite_number", "Input should be a finite number")
        return value

    _encodable_texts = field_validator("prompt", "negative_prompt", "model", "size", "schedule")(_encodable)
    _text = field_validator("prompt")(_not_empty)


class ImageRequest(GenerationRequest):
    """Body of ``POST /v1/images/generations``: OpenAI's fields, and ours."""

    n: Annotated[int, Field(ge=1)] | None = Field(None, description="Number of pictures; seeds count up from `seed`.")
    quality: Quality | None = Field(None, description="Accepted for compatibility; schedules decide the quality.")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of JPEG and WebP, 0 to 100."
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are always opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Accepted and ignored.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Accepted and ignored.")
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="Accepted and ignored.")
    safety_identifier: Annotated[str, Field(max_length=512)] | None = Field(None, description="Echoed; never logged.")
    stream: bool | None = Field(None, description="Answer with Server-Sent Events.")
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="Low-resolution results to show on the way; only with stream."
    )
    # Sent by OpenAI's own clients for models that are not ours.
    complexity: Any = Field(None, description="Accepted and ignored.")
    frame_count: Any = Field(None, description="Accepted and ignored.")
    frame_duration_ms: Any = Field(None, description="Accepted and ignored.")
    svg: Any = Field(None, description="Accepted and ignored.")
    prompt_rewriter: Any = Field(None, description="Accepted and ignored.")

    _encodable_names = field_validator("user", "safety_identifier")(_encodable)


class VideoRequest(GenerationRequest):
    """Body of ``POST /v1/videos``, as JSON or as a form."""

    seconds: Annotated[str, Field(max_length=32)] | None = Field(
        None, description="Length of the film; within half a second of what the model makes."
    )
    input_reference: Any = Field(None, description="Not taken: films are drawn from text alone.")
    fps: Annotated[int, Field(ge=1, le=60)] | None = Field(
        None, description="Frames a second at which the film plays; default: what the model learned from."
    )
    num_frames: Annotated[int, Field(ge=1)] | None = Field(None, description="Frames of the film.")

    @field_validator("seconds", mode="before")
    @classmethod
    def _a_number(cls, value: Any) -> Any:
        """OpenAI's clients send a text; a plain number is as good."""
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 10**6:
            value = f"{value:g}"
        if isinstance(value, str) and not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", value):
            raise PydanticCustomError("number_text", 'Input should be a number of seconds, such as "5"')
        return value


class RemixRequest(BaseModel):
    """Body of ``POST /v1/videos/{id}/remix``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(description="What to draw instead, from the same noise.")

    _encodable_text = field_validator("prompt")(_encodable)
    _text = field_validator("prompt")(_not_empty)


class InputTokensDetails(BaseModel):
    """Where the input tokens come from."""

    image_tokens: int = 0
    text_tokens: int


class Usage(BaseModel):
    """Token counts: text in, and picture tokens of the finished pictures out."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int


class StageReport(BaseModel):
    """One stage of one schedule and what it took; seconds are means over the request's pictures."""

    size: str
    steps: int
    seconds: float
    batch_sizes: list[int] = Field(description="Pictures that shared each step, of the request's first picture.")


class SecondsReport(BaseModel):
    """Where a reply's time went. Queue, encode, decode and package are means over the request's pictures."""

    queue: float
    encode: float
    decode: float
    package: float
    compute: float = Field(description="All work of a picture, queues left out.")
    total: float = Field(description="From admission to the finished reply.")


class RmdReport(BaseModel):
    """What this server knows about how a reply was made."""

    seed: int
    seeds: list[int]
    schedule: str
    executor: str
    stages: list[StageReport]
    seconds: SecondsReport
    teacher_seconds: dict[str, float] = Field(
        description="One picture by the teacher on this machine: by kind, 'eager' and 'compiled'."
    )
    teacher_age_seconds: dict[str, float] = Field(description="Since the teacher's step was last timed.")
    teacher_spread: dict[str, float] = Field(
        description="Third over first quartile of its latest timings: above 1.5 the machine was not steady."
    )
    speedup: dict[str, float] = Field(
        description="teacher_seconds over seconds.compute, by kind; left out where the timings are not steady."
    )
    cut_tokens: int = Field(description="Tokens at the prompt's end that no text encoder heard.")
    note: str = Field(description="Of the schedule, such as that the weights were not distilled for it; mostly empty.")


class ImageData(BaseModel):
    """One picture: base64 or a URL."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None


class ImageReply(BaseModel):
    """Reply of ``POST /v1/images/generations``."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    quality: Literal["low", "medium", "high", "xhigh", "max"]
    size: str
    usage: Usage
    safety_identifier: str | None = None
    rmd: RmdReport


class VideoError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class Video(BaseModel):
    """A video job; times are seconds since 1970."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: Annotated[int, Field(ge=0, le=100)]
    created_at: int
    completed_at: int | None
    expires_at: int | None
    seconds: str
    size: str
    prompt: str
    remixed_from_video_id: str | None
    error: VideoError | None
    rmd: dict[str, Any] = Field(description="Schedule, seed and frames; once completed, how it was made.")


class VideoList(BaseModel):
    """Reply of ``GET /v1/videos``."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """Reply of ``DELETE /v1/videos/{id}``."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every reply with a status of 400 or above."""

    error: ErrorBody


class ModelEntry(BaseModel):
    """One served model; ``rmd`` lists what requests may ask of it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rmd"
    rmd: dict[str, Any]


class ModelList(BaseModel):
    """Reply of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]
