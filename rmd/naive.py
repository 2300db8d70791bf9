"""Cascades without training: a public student's first steps at smaller sides, its weights as they are.

The times of the smaller sides are Eq. 2's shift, the hand-over is Eq. 4 and 10. That the weights were not distilled for
it is said in the cascade's note.
"""

from __future__ import annotations

from dataclasses import replace

from rmd.cascade import Cascade
from rmd.noise_rules import step_noise_intensities
from rmd.presets import NOT_DISTILLED, family_of, parse_split, preset, preset_noise_schedule
from rmd.profiles import PROFILES
from rmd.size import Size
from rmd.students import STEP_LISTS

# Without training the network has only seen noise that is white at its own side: fresh where the student's sampler
# draws fresh noise anyway, else mostly fresh, the predicted share renormalised (as in Bottleneck Sampling's preset).
_PREDICTED_SHARE = 0.2
_SMALLEST_MULTIPLE = 16


def naive_cascade(name: str, schedule: str) -> Cascade:
    """A student's steps, the first of them at smaller sides.

    Args:
        name: a public student's preset with one stage.
        schedule: steps per stage, such as "2+2"; as many in all as the student has.

    Returns:
        a cascade called `<name>-naive` with a note that its weights were not distilled for it. Its sides are the
        backbone's ladder below the student's own, then halves.

    Raises:
        ValueError: not a student, one of several sizes already, or a schedule that does not fit.
    """
    student = preset(name)
    entry = STEP_LISTS.get(name)
    if entry is None or not entry.source:
        raise ValueError(f"preset {name!r} is no public student; a naive cascade is made of one's steps")
    if len(student.stages) > 1:
        raise ValueError(f"preset {name!r} was distilled for several sizes; use it as it is")
    counts = parse_split(schedule)
    if len(counts) == 1:
        raise ValueError(f"schedule {schedule!r} has one stage: that is preset {name!r} itself, without naive")
    if sum(counts) != student.num_steps:
        raise ValueError(f"preset {name!r} has {student.num_steps} steps, and schedule {schedule!r} {sum(counts)}")
    noise_schedule = preset_noise_schedule(name)
    sizes = _ladder(student.full_size, PROFILES[family_of(entry.backbone)].sizes, len(counts))
    climbing = Cascade.from_steps(
        f"{name}-naive",
        entry.timesteps,
        [size for size, count in zip(sizes, counts, strict=True) for _ in range(count)],
        resolution_map="shift",
        flow_shift=student.flow_shift,
        guidance_scale=student.guidance_scale,
        transition_noise_intensity=0.0 if entry.noise_rule == "fresh" else _PREDICTED_SHARE,
        noise_upsampling="renormalised",
        final_timestep=student.final_timestep,
        note=f"{NOT_DISTILLED}: {name}'s weights, their first steps at smaller sides",
    )
    times = [step.timestep for step in climbing.steps]
    return replace(
        climbing,
        step_noise_intensity=step_noise_intensities(entry.noise_rule, noise_schedule, times, entry.eta),
        initial_noise_scale=noise_schedule.sigma(climbing.steps[0].t) if entry.starts_at_sigma else 1.0,
    )


def _ladder(full: Size, known: tuple[Size, ...], count: int) -> list[Size]:
    """`count` sizes up to `full`, ascending."""
    sizes = [size for size in known if size.short_side <= full.short_side] if full in known else [full]
    while len(sizes) < count:
        width, height = sizes[0].width // 2, sizes[0].height // 2
        if width % _SMALLEST_MULTIPLE or height % _SMALLEST_MULTIPLE:
            raise ValueError(f"{count} stages below {full} need sides that are multiples of {_SMALLEST_MULTIPLE}")
        sizes.insert(0, Size(width, height, full.num_frames))
    return sizes[-count:]
