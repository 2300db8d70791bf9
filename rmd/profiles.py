"""What the papers print of each backbone: sizes, thresholds, guidance, as data.

`rmd.presets` turns these into cascades; `rmd.students` has the explicit step lists of public students.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from rmd.noise_schedule import NoiseSchedule, RectifiedFlow, VariancePreserving
from rmd.size import Size
from rmd.timesteps import tabled_teacher_timesteps, uniform_teacher_timesteps


@lru_cache(maxsize=1)
def sdxl_schedule() -> NoiseSchedule:
    """SDXL's scaled-linear table."""
    return VariancePreserving.scaled_linear()


@lru_cache(maxsize=1)
def pixart_schedule() -> NoiseSchedule:
    """PixArt's linear table."""
    return VariancePreserving.linear()


@lru_cache(maxsize=1)
def rectified_flow() -> NoiseSchedule:
    """SD3.5's, Wan's and the embedded model's flow."""
    return RectifiedFlow()


# As diffusers' WanPipeline documents it, after Wan2.1's own.
WAN_NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)


@dataclass(frozen=True)
class BackboneProfile:
    """What one backbone's cascades have in common.

    Attributes:
        sizes: the ladder of resolutions, ascending; a cascade of n stages uses the last n.
        thresholds: printed logSNR thresholds by split; other splits get midway thresholds.
        transition_noise_intensity: Eq. 10's `a` at inference; `training_noise_intensity` in roll-outs and
            `score_noise_intensity` in the noised sample that teacher and fake score see.
        teacher_timesteps: number of steps -> the teacher's integer timesteps.
    """

    name: str
    noise_schedule: Callable[[], NoiseSchedule]
    sizes: tuple[Size, ...]
    default_split: str
    thresholds: Mapping[str, tuple[float, ...]]
    teacher_timesteps: Callable[[int], tuple[int, ...]]
    teacher_guidance: float
    teacher_steps: int
    flow_shift: float = 1.0
    transition_noise_intensity: float = 1.0
    training_noise_intensity: float = 0.2
    score_noise_intensity: float = 0.2


_SIDES = tuple(Size.square(side) for side in (256, 512, 1024))
_IMAGE_THRESHOLDS: Mapping[str, tuple[float, ...]] = {
    "1+3": (-6.0,),
    "2+2": (-2.5,),
    "3+1": (0.0,),
    "1+1+2": (-6.0, -2.5),
    "1+2+1": (-6.0, 0.0),
    "2+1+1": (-2.5, 0.0),
}

PROFILES: dict[str, BackboneProfile] = {
    "sdxl": BackboneProfile(
        name="sdxl",
        noise_schedule=sdxl_schedule,
        sizes=_SIDES,
        default_split="2+2",
        thresholds=_IMAGE_THRESHOLDS,
        teacher_timesteps=uniform_teacher_timesteps,
        teacher_guidance=7.5,
        teacher_steps=40,
    ),
    "pixart": BackboneProfile(
        name="pixart",
        noise_schedule=pixart_schedule,
        sizes=_SIDES,
        default_split="2+2",
        thresholds=_IMAGE_THRESHOLDS,
        teacher_timesteps=uniform_teacher_timesteps,
        teacher_guidance=3.5,
        teacher_steps=25,
    ),
    "sd3": BackboneProfile(
        name="sd3",
        noise_schedule=rectified_flow,
        sizes=_SIDES,
        default_split="2+2",
        # On SD3.5 the last step's logSNR is exactly 0 (t = 0.5), so 0 still cuts before it.
        thresholds=_IMAGE_THRESHOLDS,
        teacher_timesteps=lambda steps: uniform_teacher_timesteps(steps, 3.0),
        teacher_guidance=4.5,
        teacher_steps=40,
        flow_shift=3.0,
    ),
    "wan": BackboneProfile(
        name="wan",
        noise_schedule=rectified_flow,
        sizes=(Size(832, 480, 81), Size(1280, 720, 81)),
        default_split="3+3",
        thresholds={"3+3": (-4.0,)},
        teacher_timesteps=lambda steps: tabled_teacher_timesteps(steps, 5.0),
        teacher_guidance=5.0,
        teacher_steps=50,
        flow_shift=5.0,
        transition_noise_intensity=0.9,
        training_noise_intensity=0.5,
        score_noise_intensity=0.5,
    ),
    "embedded": BackboneProfile(
        name="embedded",
        noise_schedule=rectified_flow,
        sizes=(Size.square(128), Size.square(256)),
        default_split="2+2",
        # Plain flow, no shift: the steps' logSNRs are -inf, -2.20, 0, 2.20.
        thresholds={"1+3": (-3.0,), "2+2": (-1.5,), "3+1": (1.0,)},
        teacher_timesteps=uniform_teacher_timesteps,
        teacher_guidance=3.0,
        teacher_steps=50,
        # Measured on training pictures (docs/training.md): the paper's 1 takes detail away, since predicted noise,
        # resized, has no fine grain for the 256 px steps to start from; less than 0.8 leaves KID higher.
        transition_noise_intensity=0.9,
        training_noise_intensity=0.5,
    ),
    # Wan's steps, which its ratio of sides, 1.5, gives here too.
    "embedded-video": BackboneProfile(
        name="embedded-video",
        noise_schedule=rectified_flow,
        sizes=(Size(96, 96, 9), Size(144, 144, 9)),
        default_split="3+3",
        thresholds={"3+3": (-4.0,)},
        teacher_timesteps=lambda steps: tabled_teacher_timesteps(steps, 5.0),
        teacher_guidance=4.0,
        teacher_steps=50,
        flow_shift=5.0,
        transition_noise_intensity=0.9,
        training_noise_intensity=0.5,
        score_noise_intensity=0.5,
    ),
}
