"""Named cascades, made from what :mod:`rmd.profiles` and :mod:`rmd.students` list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from rmd.cascade import Cascade
from rmd.noise_rules import step_noise_intensities
from rmd.noise_schedule import NoiseSchedule
from rmd.profiles import PROFILES, BackboneProfile
from rmd.students import NOT_SUPPORTED, STEP_LISTS, StepList
from rmd.timesteps import thresholds_for_counts

NOT_DISTILLED = "not distilled for this schedule"


def parse_split(split: str) -> list[int]:
    """Steps per stage of a schedule's name, zeros left out: "0+4" is [4].

    Raises:
        ValueError: it is none.
    """
    try:
        counts = [int(part) for part in split.split("+")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 0 or counts[-1] == 0:
        raise ValueError(f'schedule {split!r} is not steps per stage such as "2+2", "0+4" or "1+1+2"')
    return [count for count in counts if count > 0]


def from_profile(
    profile: BackboneProfile,
    thresholds: Sequence[float] | None = None,
    resolution_map: str | None = None,
    schedule: str | None = None,
) -> Cascade:
    """The cascade of a backbone's profile; the options are :func:`preset`'s."""
    noise_schedule = profile.noise_schedule()
    split = schedule or profile.default_split
    counts = parse_split(split)
    teacher_timesteps = profile.teacher_timesteps(sum(counts))
    if thresholds is None:
        printed = profile.thresholds.get("+".join(map(str, counts)))
        thresholds = printed or thresholds_for_counts(noise_schedule, teacher_timesteps, counts)
    num_stages = len(thresholds) + 1
    if num_stages > len(profile.sizes):
        shown = ", ".join(map(str, profile.sizes))
        raise ValueError(f"{profile.name}: {num_stages} stages need as many sizes; its sizes are {shown}")
    return Cascade.from_thresholds(
        profile.name,
        noise_schedule,
        profile.sizes[-num_stages:],
        teacher_timesteps,
        thresholds,
        resolution_map=resolution_map or "shift",
        flow_shift=profile.flow_shift,
        transition_noise_intensity=profile.transition_noise_intensity,
        training_noise_intensity=profile.training_noise_intensity,
        score_noise_intensity=profile.score_noise_intensity,
    )


def _from_step_list(
    name: str,
    entry: StepList,
    thresholds: Sequence[float] | None = None,
    resolution_map: str | None = None,
    schedule: str | None = None,
) -> Cascade:
    if thresholds is not None or schedule is not None:
        raise ValueError(f"preset {name!r} is an explicit list of steps: it takes no thresholds and no schedule")
    noise_schedule = PROFILES[family_of(entry.backbone)].noise_schedule()
    return Cascade.from_steps(
        name,
        entry.timesteps,
        entry.sizes,
        schedule=noise_schedule,
        resolution_map=resolution_map or entry.resolution_map,
        step_noise_intensity=step_noise_intensities(entry.noise_rule, noise_schedule, entry.timesteps, entry.eta),
        transition_noise_intensity=entry.transition_noise_intensity,
        guidance_scale=entry.guidance_scale,
        flow_shift=entry.flow_shift,
        noise_upsampling=entry.noise_upsampling,
        x0_upsampling=entry.x0_upsampling,
        initial_noise_scale=noise_schedule.sigma(entry.timesteps[0] / 1000) if entry.starts_at_sigma else 1.0,
        final_timestep=entry.final_timestep,
        note="" if entry.source else f"{NOT_DISTILLED}: the base's own weights",
    )


_BACKBONES = {"wan": "wan-14b"}  # of the two of that profile, the one with its sizes


def family_of(backbone: str) -> str:
    """The key in `PROFILES` of a backbone of the registry."""
    return "wan" if backbone.startswith("wan-") else backbone


PRESETS: dict[str, Callable[..., Cascade]] = {
    **{name: partial(from_profile, profile) for name, profile in PROFILES.items()},
    **{name: partial(_from_step_list, name, entry) for name, entry in STEP_LISTS.items()},
}


def preset(
    name: str,
    thresholds: Sequence[float] | None = None,
    resolution_map: str | None = None,
    schedule: str | None = None,
) -> Cascade:
    """A named cascade: a backbone's (a key of :data:`rmd.profiles.PROFILES`) or a public student's
    (:data:`rmd.students.STEP_LISTS`).

    Args:
        thresholds: logSNR thresholds instead of the backbone's own.
        resolution_map: instead of the preset's own.
        schedule: steps per stage, such as "1+3", "0+4" or "1+1+2"; thresholds given as well win over its split.

    Raises:
        ValueError: an unknown name, one that is known and not supported, or options that do not fit the preset.
    """
    _known(name)
    return PRESETS[name](thresholds=thresholds, resolution_map=resolution_map, schedule=schedule)


def _known(name: str) -> None:
    if name in NOT_SUPPORTED:
        raise ValueError(f"preset {name!r} is not supported: {NOT_SUPPORTED[name]}")
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")


def preset_backbone(name: str) -> str:
    """The backbone that a preset is made for, as the registry calls it.

    Raises:
        ValueError: an unknown name, or one that is not supported.
    """
    _known(name)
    return STEP_LISTS[name].backbone if name in STEP_LISTS else _BACKBONES.get(name, name)


def preset_noise_schedule(name: str) -> NoiseSchedule:
    """The noise schedule of the backbone that a preset is made for.

    Raises:
        ValueError: an unknown name, or one that is not supported.
    """
    return PROFILES[family_of(preset_backbone(name))].noise_schedule()
