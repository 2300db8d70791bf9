"""Finished pictures to the shapes on the wire."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal

from server.core.card import ModelCard
from server.core.stations import StationKey
from server.front.files import LinkedPictures
from server.front.generation import FinishedPicture, Generation, PartialPicture
from server.front.media import MEDIA_TYPES
from server.http.schemas import (
    ImageData,
    ImageReply,
    ImageRequest,
    InputTokensDetails,
    RmdReport,
    SecondsReport,
    StageReport,
    Usage,
)

ReplyQuality = Literal["low", "medium", "high", "xhigh", "max"]


async def image_reply(
    model: ModelCard,
    linked: LinkedPictures,
    body: ImageRequest,
    generation: Generation,
    pictures: Sequence[FinishedPicture],
    base_url: str,
) -> dict[str, Any]:
    """Return the JSON body of a finished, unstreamed request; stores its pictures where URLs were asked for.

    Raises:
        StoreError: they cannot be stored.
    """
    spec = generation.spec
    ordered = sorted(pictures, key=lambda picture: picture.index)
    if body.response_format == "url":
        media_type = MEDIA_TYPES[spec.output_format]
        names = await linked.put([picture.content for picture in ordered], media_type, spec.output_format)
        data = [ImageData(url=f"{base_url.rstrip('/')}/files/{name}") for name in names]
    else:
        data = [ImageData(b64_json=picture.encoded) for picture in ordered]
    return ImageReply(
        created=int(time.time()),
        data=data,
        output_format=spec.output_format,
        quality=reply_quality(body),
        size=str(spec.cascade.full_size),
        usage=usage(model, generation, len(ordered)),
        safety_identifier=body.safety_identifier,
        rmd=report(model, generation, ordered),
    ).model_dump(exclude_none=False)


def partial_event(body: ImageRequest, generation: Generation, picture: PartialPicture) -> dict[str, Any]:
    """Return an ``image_generation.partial_image`` event; its size is that of the stage it comes from."""
    return {
        "type": "image_generation.partial_image",
        **_event_fields(body, generation, picture.encoded, str(picture.size)),
        "partial_image_index": picture.partial_index,
        "rmd": {"index": picture.index, "seed": generation.spec.seeds[picture.index]},
    }


def completed_event(
    model: ModelCard, body: ImageRequest, generation: Generation, picture: FinishedPicture
) -> dict[str, Any]:
    """Return an ``image_generation.completed`` event with the usage of this one picture."""
    rmd = report(model, generation, [picture]).model_dump()
    return {
        "type": "image_generation.completed",
        **_event_fields(body, generation, picture.encoded, str(generation.spec.cascade.full_size)),
        "usage": usage(model, generation, 1).model_dump(),
        "safety_identifier": body.safety_identifier,
        "rmd": {"index": picture.index, **rmd, "seed": generation.spec.seeds[picture.index]},
    }


def usage(model: ModelCard, generation: Generation, pictures: int) -> Usage:
    """Return the token counts: the prompt's, and the picture tokens of the finished pictures at full size."""
    text = generation.text_tokens
    output = model.tokens[str(generation.spec.cascade.full_size)] * pictures
    return Usage(
        input_tokens=text,
        input_tokens_details=InputTokensDetails(text_tokens=text),
        output_tokens=output,
        total_tokens=text + output,
    )


def report(model: ModelCard, generation: Generation, pictures: Sequence[FinishedPicture]) -> RmdReport:
    """Return the ``rmd`` object: how the pictures were made and where the time went."""
    spec = generation.spec
    records = [picture.record for picture in pictures]
    stages: list[StageReport] = []
    for size in dict.fromkeys(step.size for step in spec.cascade.steps):
        label = StationKey("denoise", spec.lane, size, spec.model).label
        stages.append(
            StageReport(
                size=str(size),
                steps=sum(step.size == size for step in spec.cascade.steps),
                seconds=round(fmean(record.stages.get(label, 0.0) for record in records), 6),
                batch_sizes=records[0].batches.get(label, []),
            )
        )
    compute = fmean(record.compute for record in records)
    return RmdReport(
        seed=spec.seeds[0],
        seeds=list(spec.seeds),
        schedule=spec.schedule,
        executor=model.executor_of(spec.cascade, spec.lane),
        stages=stages,
        seconds=SecondsReport(
            queue=round(fmean(record.queue for record in records), 6),
            encode=round(fmean(record.encode for record in records), 6),
            decode=round(fmean(record.decode for record in records), 6),
            package=round(fmean(record.package for record in records), 6),
            compute=round(compute, 6),
            total=round(time.monotonic() - generation.arrived, 6),
        ),
        teacher_seconds={baseline.kind: round(baseline.seconds, 6) for baseline in model.baselines},
        teacher_age_seconds={b.kind: round(time.monotonic() - b.measured, 1) for b in model.baselines},
        teacher_spread={baseline.kind: round(baseline.spread, 2) for baseline in model.baselines},
        cut_tokens=generation.cut_tokens,
        note=spec.cascade.note,
        speedup={kind: round(ratio, 3) for kind, ratio in model.speedups(compute).items()},
    )


def reply_quality(body: ImageRequest) -> ReplyQuality:
    """Echo a quality that the client's reply type knows; 'high' for the others."""
    if body.quality in ("low", "medium", "high", "xhigh", "max"):
        return body.quality
    return "high"


def _event_fields(body: ImageRequest, generation: Generation, encoded: str, size: str) -> dict[str, Any]:
    return {
        "b64_json": encoded,
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": generation.spec.output_format,
        "quality": reply_quality(body),
        "size": size,
    }
