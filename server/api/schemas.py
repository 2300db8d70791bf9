"""The shapes on the wire. Types and ranges only; what depends on the served model is checked in the route."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

LARGEST_SEED = 2**63 - 1

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]


class ImageRequest(BaseModel):
    """Body of ``POST /v1/images/generations``: OpenAI's fields, then ours."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(description="What to draw.")
    model: str | None = Field(None, description="A model id from /v1/models; none: the one this server holds.")
    n: Annotated[int, Field(ge=1)] | None = Field(None, description="Number of pictures; seeds count up from `seed`.")
    size: str | None = Field(None, description='"WIDTHxHEIGHT" of the model\'s sizes, or "auto".')
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

    @field_validator("prompt", "negative_prompt", "model", "size", "schedule", "user", "safety_identifier")
    @classmethod
    def _encodable(cls, value: str | None) -> str | None:
        """Refuse lone surrogates, which JSON can carry, no tokenizer can read and no reply can quote."""
        if value is not None:
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise PydanticCustomError("unicode_text", "Input should be valid Unicode text") from None
        return value

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise PydanticCustomError("empty_prompt", "Input should not be empty: say what to draw")
        return value


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
        description="One picture by the teacher on this machine, timed at start: by kind, 'eager' and 'compiled'."
    )
    speedup: dict[str, float] = Field(description="Those over seconds.compute, by the same kinds.")


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
