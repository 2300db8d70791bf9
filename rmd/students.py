"""Students that others distilled and published: steps, noise rule, guidance, source and licence, as data.

`rmd.presets` turns an entry into a cascade; `rmd.backbones.student_fit` says whether a folder's files contradict it.
Steps and rules are those of each publication's own instructions, held against diffusers' schedulers and pipelines in
tests/oracles/test_students.py. A licence with a question mark is not confirmed: read the repository's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rmd.size import Size
from rmd.timesteps import euler_timesteps, reference_timesteps, shift_time, uniform_teacher_timesteps


@dataclass(frozen=True)
class StepList:
    """An explicit list of steps: a public student's, or of sampling at several sizes without training.

    Attributes:
        backbone: its name in the registry.
        timesteps: the teacher's timesteps, one a step; a table index such as 999 is kept as it is, since on the
            variance preserving models timestep i is the table's entry i.
        sizes: one a step.
        noise_rule, eta: how the next state is made at the same side, see `rmd.noise_rules`.
        guidance_scale: 1 where the publication turns guidance off (0 or 1 in diffusers).
        starts_at_sigma: sampling starts from `sigma(t) z` instead of `z` (diffusers' Euler samplers with "trailing"
            spacing, rCM).
        final_timestep: see `rmd.cascade.Cascade`.
        prediction: what the network gives: "epsilon", "velocity" or "sample" (x0 itself).
        lora_strength: at which its instructions merge its LoRA, besides the file's own alpha; 1 where they name none.
        base: the model that it was distilled from, see `rmd.backbones.student_fit`; None for any of the backbone.
        source: repository of the weights; empty where none are needed.
        files: which of its files, and how they are published.
        whole: they are a folder, which is an import's base, and not what is put into one.
        licence: of the weights; empty where it is not known.
        note: what a user has to know.
    """

    backbone: str
    timesteps: tuple[float, ...]
    sizes: tuple[Size, ...]
    noise_rule: str = "deterministic"
    eta: float = 0.0
    transition_noise_intensity: float = 1.0
    resolution_map: str = "none"
    guidance_scale: float = 1.0
    flow_shift: float = 1.0
    noise_upsampling: str = "bilinear"
    x0_upsampling: str = "bilinear"
    starts_at_sigma: bool = False
    final_timestep: float | None = None
    prediction: str = "epsilon"
    lora_strength: float = 1.0
    base: str | None = None
    source: str = ""
    files: str = ""
    whole: bool = False
    licence: str = ""
    note: str = ""


def _sides(*sides: int) -> tuple[Size, ...]:
    return tuple(Size.square(side) for side in sides)


# ---- SDXL -----------------------------------------------------------------------------------------------------------

# diffusers' "trailing" spacing: round(1000 - 1000 k / n) - 1.
_TRAILING_2 = (999, 499)
_TRAILING_4 = (999, 749, 499, 249)
_TRAILING_8 = (999, 874, 749, 624, 499, 374, 249, 124)
# Consistency models' grid: n of the 50 entries 19, 39, .. 999, from the end.
_GRID_2 = (999, 499)
_GRID_4 = (999, 759, 499, 259)
_GRID_8 = (999, 879, 759, 639, 499, 379, 259, 139)

_LIGHTNING = "ByteDance/SDXL-Lightning"
_HYPER = "ByteDance/Hyper-SD"
_PCM = "wangfuyun/PCM_Weights"
_NON_COMMERCIAL = "CC BY-NC-SA 4.0: no commercial use"


def _sdxl(timesteps: tuple[float, ...], source: str, files: str, licence: str, **options: object) -> StepList:
    entry = StepList("sdxl", timesteps, _sides(1024) * len(timesteps), base="sdxl")
    return replace(entry, source=source, files=files, licence=licence, **options)  # type: ignore[arg-type]


def _turbo(timesteps: tuple[float, ...]) -> StepList:
    return _sdxl(
        timesteps, "stabilityai/sdxl-turbo", "whole folder", "Stability AI, no commercial use?",
        sizes=_sides(512) * len(timesteps), noise_rule="ancestral", starts_at_sigma=True, whole=True,
        note="made for 512 px",
    )  # fmt: skip


def _lightning(timesteps: tuple[float, ...]) -> StepList:
    count = len(timesteps)
    files = f"sdxl_lightning_{count}step_unet.safetensors (whole UNet) or _lora"
    return _sdxl(timesteps, _LIGHTNING, files, "openrail++", starts_at_sigma=True)


def _hyper(timesteps: tuple[float, ...]) -> StepList:
    # SDXL's own scheduler configuration ends DDIM at the table's entry 0 (set_alpha_to_one: false).
    files = f"Hyper-SDXL-{len(timesteps)}steps-lora.safetensors"
    return _sdxl(timesteps, _HYPER, files, "openrail++", final_timestep=0)


def _pcm(timesteps: tuple[float, ...]) -> StepList:
    # Published with TCDScheduler through the SDXL pipeline, which hands it its own default, eta = 0.
    files = f"sdxl/pcm_sdxl_smallcfg_{len(timesteps)}step_converted.safetensors (LoRA)"
    return _sdxl(timesteps, _PCM, files, "", noise_rule="tcd", final_timestep=0)


_SDXL = {
    "sdxl-turbo": _turbo((999,)),
    "sdxl-turbo-2": _turbo(_TRAILING_2),
    "sdxl-turbo-4": _turbo(_TRAILING_4),
    "sdxl-lightning": _lightning(_TRAILING_4),
    "sdxl-lightning-2": _lightning(_TRAILING_2),
    "sdxl-lightning-8": _lightning(_TRAILING_8),
    "sdxl-lightning-1": _sdxl(
        (999,), _LIGHTNING, "sdxl_lightning_1step_unet_x0.safetensors (whole UNet)", "openrail++",
        prediction="sample", starts_at_sigma=True,
        note='the UNet gives x0: the folder\'s scheduler must say "prediction_type": "sample"',
    ),
    "hyper-sdxl-2": _hyper(_TRAILING_2),
    "hyper-sdxl-4": _hyper(_TRAILING_4),
    "hyper-sdxl-8": _hyper(_TRAILING_8),
    "hyper-sdxl-8-cfg": replace(
        _hyper(_TRAILING_8), guidance_scale=5.0, files="Hyper-SDXL-8steps-CFG-lora.safetensors",
        note="guidance 5 to 8, so two passes a step",
    ),
    "hyper-sdxl-1": _sdxl(
        (800,), _HYPER, "Hyper-SDXL-1step-Unet.safetensors (whole UNet)", "openrail++",
        note="told timestep 800, from unit noise",
    ),
    "hyper-sdxl-unified": _sdxl(
        _GRID_4, _HYPER, "Hyper-SDXL-1step-lora.safetensors", "openrail++", noise_rule="tcd", eta=1.0, final_timestep=0,
        note="one LoRA for 1 to 8 steps; 4 of them here",
    ),
    "dmd2-sdxl": _sdxl(
        _TRAILING_4, "tianweiy/DMD2", "dmd2_sdxl_4step_lora_fp16.safetensors; whole UNet as .bin", _NON_COMMERCIAL,
        noise_rule="fresh",
    ),
    "dmd2-sdxl-1": _sdxl(
        (399,), "tianweiy/DMD2", "dmd2_sdxl_1step_unet_fp16.bin (whole UNet, pickled: convert it)", _NON_COMMERCIAL,
        note="told timestep 399, from unit noise",
    ),
    "lcm-sdxl": _sdxl(
        _GRID_4, "latent-consistency/lcm-lora-sdxl", "pytorch_lora_weights.safetensors", "openrail++",
        noise_rule="fresh", note="guidance up to 2 works too",
    ),
    "lcm-sdxl-8": _sdxl(
        _GRID_8, "latent-consistency/lcm-lora-sdxl", "pytorch_lora_weights.safetensors", "openrail++",
        noise_rule="fresh", note="guidance up to 2 works too",
    ),
    "lcm-sdxl-unet": _sdxl(
        _GRID_4, "latent-consistency/lcm-sdxl", "whole UNet", "openrail++", noise_rule="fresh",
        note="takes its guidance as an input: rmd import --fold-guidance 8 makes one a bias",
    ),
    "tcd-sdxl": _sdxl(
        _GRID_4, "h1t/TCD-SDXL-LoRA", "pytorch_lora_weights.safetensors", "", noise_rule="tcd", eta=0.3,
        final_timestep=0, note="eta 0.3, as published",
    ),
    "pcm-sdxl-2": _pcm(_GRID_2),
    "pcm-sdxl-4": _pcm(_GRID_4),
    "pcm-sdxl-8": _pcm(_GRID_8),
    "pcm-sdxl-4-cfg": replace(
        _pcm(_GRID_4), guidance_scale=7.5, files="sdxl/pcm_sdxl_normalcfg_4step_converted.safetensors (LoRA)",
        note="guidance 7.5, so two passes a step",
    ),
    "pcm-sdxl-lcm": _sdxl(
        _GRID_4, _PCM, "sdxl/pcm_sdxl_lcmlike_lora_converted.safetensors", "", noise_rule="fresh"
    ),
    "flash-sdxl": _sdxl(_GRID_4, "jasperai/flash-sdxl", "LoRA, as a PEFT folder", "CC BY-NC 4.0", noise_rule="fresh"),
    "swd-sdxl": _sdxl(
        (1000, 800, 600, 400), "yresearch/swd-sdxl", "LoRA, as a PEFT folder", "",
        sizes=_sides(512, 640, 768, 1024), noise_rule="fresh", transition_noise_intensity=0.0, x0_upsampling="bicubic",
        note="here the UNet is told each step's own side; whether its own pipeline does so is not confirmed",
    ),
}  # fmt: skip

# ---- PixArt-alpha ---------------------------------------------------------------------------------------------------

_PIXART = {
    "pixart-lcm": StepList(
        "pixart", _GRID_4, _sides(1024) * 4, noise_rule="fresh", base="pixart-1024",
        source="PixArt-alpha/PixArt-LCM-XL-2-1024-MS", files="whole folder", whole=True,
        licence="openrail++",
    ),
    "pixart-dmd": StepList(
        "pixart", (400,), _sides(512), base="pixart-512",
        source="PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512", licence="",
        files="transformer and scheduler; the rest from PixArt-alpha/PixArt-XL-2-1024-MS", whole=True,
        note="told timestep 400, from unit noise; made for 512 px",
    ),
    "flash-pixart": StepList(
        "pixart", _GRID_4, _sides(1024) * 4, noise_rule="fresh", base="pixart-1024",
        source="jasperai/flash-pixart", files="LoRA, as a PEFT folder", licence="CC BY-NC 4.0",
    ),
}  # fmt: skip

# ---- Stable Diffusion 3 and 3.5 -------------------------------------------------------------------------------------


def _sd3(base: str, timesteps: tuple[float, ...], source: str, files: str, **options: object) -> StepList:
    entry = StepList("sd3", timesteps, _sides(1024) * len(timesteps), prediction="velocity", flow_shift=3.0, base=base)
    return replace(entry, source=source, files=files, **options)  # type: ignore[arg-type]


def _swd_sd3(sigmas: tuple[float, ...], latent_sides: tuple[int, ...]) -> StepList:
    return _sd3(
        "sd3.5-medium", tuple(round(1000 * sigma, 1) for sigma in sigmas),
        f"yresearch/swd-medium-{len(sigmas)}-steps", "LoRA, as a PEFT folder", licence="Apache-2.0",
        sizes=_sides(*(8 * side for side in latent_sides)), noise_rule="fresh", transition_noise_intensity=0.0,
        x0_upsampling="bicubic",
    )  # fmt: skip


def _hyper_sd3(count: int, guidance_scale: float) -> StepList:
    # Its card: the base's own scheduler, `fuse_lora(lora_scale=0.125)`, guidance 3, 5 and 7 at 4, 8 and 16 steps. All
    # other cards here fuse at diffusers' default, 1.
    return _sd3(
        "sd3-medium", euler_timesteps(count, 3.0), _HYPER, f"Hyper-SD3-{count}steps-CFG-lora.safetensors",
        guidance_scale=guidance_scale, lora_strength=0.125,
        note=f"guidance {guidance_scale:g}, so two passes a step",
    )  # fmt: skip


# PCM's grid: the entries 1, .76, .5, .26 of 50 phases, under the flow shift.
_PCM_SD3 = tuple(1000 * shift_time(u, 3.0) for u in (1.0, 0.76, 0.5, 0.26))

_SD3 = {
    # The scheduler spaces the sigmas between already shifted ends, hence the last, nearly clean step.
    "sd3.5-large-turbo": _sd3(
        "sd3.5-large", euler_timesteps(4, 3.0), "stabilityai/stable-diffusion-3.5-large-turbo", "whole folder",
        whole=True, licence="Stability AI Community?", note="the large model only",
    ),
    "sd3.5-medium-turbo": _sd3(
        "sd3.5-medium", euler_timesteps(8, 3.0), "tensorart/stable-diffusion-3.5-medium-turbo",
        "whole folder, or its 8-step LoRA", whole=True, licence="Stability AI Community", guidance_scale=1.5,
        note="guidance 1.5, so two passes a step",
    ),
    "hyper-sd3-4-cfg": _hyper_sd3(4, 3.0),
    "hyper-sd3-8-cfg": _hyper_sd3(8, 5.0),
    "hyper-sd3-16-cfg": _hyper_sd3(16, 7.0),
    "pcm-sd3": _sd3(
        "sd3-medium", _PCM_SD3, _PCM, "sd3/pcm_deterministic_4step_shift3.safetensors (LoRA)", guidance_scale=1.2
    ),
    "pcm-sd3-stochastic": _sd3(
        "sd3-medium", _PCM_SD3, _PCM, "sd3/: stochastic 4-step LoRA, shift 3", guidance_scale=1.2,
        noise_rule="fresh",
    ),
    # SwD, one step a scale, fresh noise and a bicubic U at every hand-over.
    "swd-sd3": _swd_sd3((1.0, 0.8959, 0.7371, 0.6022), (64, 80, 96, 128)),
    "swd-sd3-6": _swd_sd3((1.0, 0.9454, 0.8959, 0.7904, 0.7371, 0.6022), (32, 48, 64, 80, 96, 128)),
}  # fmt: skip

# ---- Wan2.1 text to video -------------------------------------------------------------------------------------------

_480P, _720P = Size(832, 480, 81), Size(1280, 720, 81)
# rCM's times are angles of the trigonometric flow, arctan(80), 1.5, 1.4, 1.0; t = tan / (1 + tan) on rectified flow.
_RCM = tuple(1000 * tangent / (1 + tangent) for tangent in (80.0, *map(math.tan, (1.5, 1.4, 1.0))))


def _wan(model: str, timesteps: tuple[float, ...], size: Size, source: str, files: str, **options: object) -> StepList:
    entry = StepList(f"wan-{model}", timesteps, (size,) * len(timesteps), noise_rule="fresh", prediction="velocity")
    return replace(entry, base=f"wan-{model}", source=source, files=files, **options)  # type: ignore[arg-type]


def _rcm(model: str, size: Size) -> StepList:
    return _wan(
        model, _RCM, size, "worstcoder/rcm-Wan", "pickled, under Wan's original names: convert it",
        licence="Apache-2.0", starts_at_sigma=True,
    )  # fmt: skip


_WAN = {
    "lightx2v-wan-14b": _wan(
        "14b", tuple(1000 * shift_time(u, 5.0) for u in (1.0, 0.75, 0.5, 0.25)), _480P,
        "lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v", "distill_model.safetensors, or its rank 64 LoRA",
        flow_shift=5.0, note="its LoRA's own loader reads no alpha: the scale is 1",
    ),
    "rcm-wan-1.3b": _rcm("1.3b", _480P),
    "rcm-wan-14b": _rcm("14b", _720P),
    "causvid-wan-1.3b": _wan(
        "1.3b", (1000, 757, 522), _480P, "tianweiy/CausVid", "bidirectional_checkpoint2/model.pt (pickled: convert it)",
        licence=_NON_COMMERCIAL, flow_shift=8.0,
        note="its table's nearest entries are 756.8 and 521.7; the network is told 757 and 522",
    ),
}  # fmt: skip

_RMD_SIZES = (_480P,) * 3 + (_720P,) * 3


def _rmd(timesteps: tuple[float, ...], flow_shift: float, note: str) -> StepList:
    # Of either size of Wan, so no base. Its noise: a share of .9 inside a stage, fresh where the size changes.
    return StepList(
        "wan-14b", timesteps, _RMD_SIZES, noise_rule="mixed", eta=0.9, transition_noise_intensity=0.0,
        prediction="velocity", flow_shift=flow_shift, source="github.com/Skylar-aigc/RMD-Inference-Acceleration",
        files="no weights are published; a folder student_model-N that its trainer wrote",
        licence="Apache-2.0 (code)", note=note,
    )  # fmt: skip


_REFERENCE = {
    "rmd-wan": _rmd(reference_timesteps(6, 3.0), 3.0, "its recipes: flow_shift_trans 1, eta 0.9 at inference"),
    # The teacher's own shift at 720p, a smaller one below: the low side gets the smaller times.
    "rmd-wan-shift5": _rmd(
        reference_timesteps(6, 3.0)[:3] + reference_timesteps(6, 5.0)[3:], 5.0, "its flow_shift_trans 2"
    ),
}  # fmt: skip

# ---- Without training -----------------------------------------------------------------------------------------------


def _training_free(sizes: tuple[Size, ...], note: str) -> StepList:
    """The teacher's guidance stays, and the noise that crosses sides is mostly fresh and renormalised, or the teacher
    would see too little of it."""
    return StepList(
        "sd3", uniform_teacher_timesteps(len(sizes), 3.0), sizes,
        resolution_map="shift", guidance_scale=4.5, flow_shift=3.0, noise_upsampling="renormalised",
        transition_noise_intensity=0.2, prediction="velocity", note=note,
    )  # fmt: skip


_TRAINING_FREE = {
    # High-low-high: layout and detail at the full side, the middle of the trajectory at half of it.
    "bottleneck": _training_free(
        _sides(1024) * 3 + _sides(512) * 5 + _sides(1024) * 4,
        "no student: Bottleneck Sampling with the base's own weights",
    ),
    "progressive": _training_free(
        _sides(512) * 6 + _sides(1024) * 6, "no student: progressive resolution with the base's own weights"
    ),
}

STEP_LISTS: Mapping[str, StepList] = {**_SDXL, **_PIXART, **_SD3, **_WAN, **_REFERENCE, **_TRAINING_FREE}

_MULTISTEP = "published with a multistep solver, which looks back at earlier steps; every step here stands alone"

NOT_SUPPORTED: Mapping[str, str] = {
    "tdm-sdxl": "no weights of TDM for SDXL are published",
    "tdm-pixart": "no weights of TDM for PixArt are published",
    "tdm-wan": "no weights of TDM for Wan are published",
    "tdm-sd3": f"Luo-Yihong/TDM_sd3_lora: {_MULTISTEP} (DPM-Solver++, flow shift 6)",
    "tdm-sd3.5": "Luo-Yihong/TDM_sd3-5_lora: a pickled list of tensors without names",
    "accvideo-wan": f"aejion/AccVideo-WanX-T2V-14B: {_MULTISTEP} (UniPC)",
    "fastwan": "FastVideo/FastWan2.1-T2V-*: another attention (video sparse attention with gates)",
    "turbowan": "TurboDiffusion/TurboWan2.1-*: another attention (sparse-linear attention)",
    "perflow-sdxl": "hansyan/perflow-sdxl-dreamshaper: a scheduler of its own, piecewise flows over four windows",
    "flash-sd3": "jasperai/flash-sd3: a scheduler of its own (FlashFlowMatchEuler), which diffusers lacks",
    "hyper-sdxl-12-cfg": "ByteDance/Hyper-SD: 12 steps do not divide the table, and diffusers' DDIM leads each step to "
    "another entry than the one that the next stands at",
    "sd3.5-turbo": "called by the model it fits: sd3.5-large-turbo, or sd3.5-medium-turbo for TensorArt's medium",
}
"""Names of published students that cannot be sampled as published -> why."""
