"""From medians to schedules and speed-ups: pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.subjects import Subject
from bench.timing import Timing
from rmd.cascade import Cascade
from rmd.size import Size

MEASURED, SUMMED = "measured", "sum of measured steps"
DECODE_SMALL = "decode, small"
PACKAGE = "pixels and PNG"
STOCK = "diffusers"
# Published: speed-up over the guided base model on an A100 at 2+2 (Wan 3+3), and of 4 (6) steps at one size.
PAPER = {
    "sdxl": {"base": "40 x 2", "schedule": "2+2", "cascade": 33.4, "single_size": 20.0},
    "pixart": {"base": "25 x 2", "schedule": "2+2", "cascade": 21.0, "single_size": 12.5},
    "sd3": {"base": "40 x 2", "schedule": "2+2", "cascade": 32.0, "single_size": 20.0},
    "wan-14b": {"base": "50 x 2", "schedule": "3+3", "cascade": 25.6, "single_size": 16.7},
}


@dataclass
class Measured:
    """Timings of one run by (variant, batch, what), what being ("step", size, guided), "text", "decode",
    :data:`DECODE_SMALL`, :data:`PACKAGE`, a schedule's name or "teacher"."""

    timings: dict[tuple[str, int, Any], Timing] = field(default_factory=dict)
    failures: dict[tuple[str, int, Any], str] = field(default_factory=dict)

    def seconds(self, variant: str, batch: int, what: Any) -> float | None:
        """The median, None where it was not measured."""
        timing = self.timings.get((variant, batch, what))
        return None if timing is None else timing.median


def step_key(size: Size, guided: bool) -> tuple[str, str, bool]:
    """The name of one step's timing."""
    return "step", str(size), guided


def schedule_seconds(
    measured: Measured, variant: str, batch: int, name: str, cascade: Cascade
) -> tuple[float, str] | None:
    """Seconds of a schedule's denoising and how they were found; None where a step is missing."""
    whole = measured.seconds(variant, batch, name)
    if whole is not None:
        return whole, MEASURED
    guided = cascade.guidance_scale != 1.0
    steps = [measured.seconds(variant, batch, step_key(step.size, guided)) for step in cascade.steps]
    known = [seconds for seconds in steps if seconds is not None]
    return (sum(known), SUMMED) if len(known) == len(steps) else None


def rows_of(
    subject: Subject, measured: Measured, variants: Sequence[str], batches: Sequence[int]
) -> list[dict[str, Any]]:
    """One row a (variant, batch, schedule): denoising and end-to-end seconds."""
    rows: list[dict[str, Any]] = []
    twice = subject.encodes_empty_prompt
    for batch in batches:
        for variant in (*variants, STOCK):
            decode, decoded_by = _part(measured, variant, batch, "decode")
            small, small_by = _part(measured, variant, batch, DECODE_SMALL)
            text, encoded_by = _part(measured, variant, batch, "text")
            package = _package(measured, batch)
            single = _part(measured, variant, 1, "text")[0] or text
            parts = (("decode", decoded_by), (DECODE_SMALL, small_by), ("text", encoded_by))
            borrowed = [what for what, by in parts if by not in (variant, "")]
            for name, cascade in (("teacher", subject.teacher), *subject.students.items()):
                found = schedule_seconds(measured, variant, batch, name, cascade)
                if found is None:
                    continue
                denoise, how = found
                # Guidance also needs the empty prompt, once.
                empty = (single or 0.0) if twice and cascade.guidance_scale != 1.0 else 0.0
                words = None if text is None else text + empty
                total = denoise + (decode or 0.0) + (words or 0.0)
                with_small = None if small is None else denoise + small + (words or 0.0)
                rows.append(
                    {
                        "variant": variant,
                        "batch": batch,
                        "schedule": name,
                        "steps": cascade.num_steps,
                        "guided": cascade.guidance_scale != 1.0,
                        "denoise_s": denoise,
                        "how": how,
                        "text_s": words,
                        "decode_s": decode,
                        "from_eager": borrowed,
                        "end_to_end_s": total,
                        "decoder_share": None if decode is None else decode / total,
                        "package_s": package,
                        "denoiser_share": denoise / (total + package),
                        "pictures_per_second": batch / total,
                        "decode_small_s": small,
                        "end_to_end_small_s": with_small,
                    }
                )
    return rows


def _package(measured: Measured, batch: int) -> float:
    """Seconds of packaging, which is the same for every variant; 0 where it was not measured."""
    found = (each.median for (_, rows, what), each in measured.timings.items() if (rows, what) == (batch, PACKAGE))
    return next(found, 0.0)


def _part(measured: Measured, variant: str, batch: int, what: str) -> tuple[float | None, str]:
    """Seconds of a part, and by which variant: eager's where the variant's own failed, so that no part is for free."""
    for by in (variant, "eager"):
        seconds = measured.seconds(by, batch, what)
        if seconds is not None:
            return seconds, by
    return None, ""


def speedups(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ratios of the rows' seconds, by batch.

    Returns:
        ``denoising_speedup`` and ``end_to_end_speedup``: batch -> schedule -> variant -> {"over_eager_teacher",
        "over_same_variant_teacher"}; ``end_to_end_small_speedup``: the same of the row with the small decoder over
        the eager teacher with the full one; ``cascade_over_single_size``: batch -> variant -> how much faster the
        default cascade is than as many steps at the full size; ``over_eager``: batch -> variant -> schedule -> ratio.
    """
    table = {(row["batch"], row["variant"], row["schedule"]): row for row in rows}
    found: dict[str, Any] = {
        name: {} for name in ("denoising_speedup", "end_to_end_speedup", "end_to_end_small_speedup")
    }
    found.update({"cascade_over_single_size": {}, "over_eager": {}})
    for (batch, variant, schedule), row in table.items():
        eager = table.get((batch, "eager", "teacher"))
        own = table.get((batch, variant, "teacher"))
        for name, key in (("denoising_speedup", "denoise_s"), ("end_to_end_speedup", "end_to_end_s")):
            entry = {
                label: teacher[key] / row[key]
                for label, teacher in (("over_eager_teacher", eager), ("over_same_variant_teacher", own))
                if teacher is not None
            }
            found[name].setdefault(str(batch), {}).setdefault(schedule, {})[variant] = entry
        if eager is not None and row.get("end_to_end_small_s"):
            ratio = eager["end_to_end_s"] / row["end_to_end_small_s"]
            entry = {"over_eager_teacher": ratio}
            found["end_to_end_small_speedup"].setdefault(str(batch), {}).setdefault(schedule, {})[variant] = entry
        pair = {"2+2": "0+4", "3+3": "0+6"}.get(schedule)
        single = table.get((batch, variant, pair)) if pair else None
        if single is not None:
            found["cascade_over_single_size"].setdefault(str(batch), {})[variant] = (
                single["denoise_s"] / row["denoise_s"]
            )
        reference = table.get((batch, "eager", schedule))
        if reference is not None and variant != "eager":
            ratio = reference["denoise_s"] / row["denoise_s"]
            found["over_eager"].setdefault(str(batch), {}).setdefault(variant, {})[schedule] = ratio
    return found
