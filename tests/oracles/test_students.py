"""Every public student against stock diffusers, as published: the stock pipeline with the scheduler that it names.

Tiny networks of the real classes with random weights, the same start and the same fresh noise (twin generators), the
state after every step. Equal means to 1e-4 of the larger of 1 and the reference's largest value.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UNet2DConditionModel,
    WanPipeline,
)
from safetensors.torch import save_file
from torch import Tensor

from rmd.backbones.base import Backbone, BackboneError
from rmd.backbones.guidance_fold import fold_guidance
from rmd.backbones.registry import get_backbone
from rmd.backbones.student_fit import check_student
from rmd.backbones.tiny import write_tiny_folder
from rmd.cascade import Cascade
from rmd.noise_rules import step_noise_intensities
from rmd.noise_schedule import RectifiedFlow, VariancePreserving
from rmd.presets import preset
from rmd.sampler import advance
from rmd.size import Size
from rmd.students import STEP_LISTS

PROMPTS = ["a red fox in the snow", "An OLD lighthouse"]
SDXL_TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

Loaded = tuple[Path, Backbone]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    made: dict[str, Loaded] = {}

    def get(name: str) -> Loaded:
        if name not in made:
            folder = write_tiny_folder(name, tmp_path_factory.mktemp("students") / name)
            made[name] = folder, get_backbone(name).load(folder, dtype=torch.float32)
        return made[name]

    return get


def at_sizes(cascade: Cascade, sizes: Sequence[Size]) -> Cascade:
    """The same cascade over small latents."""
    steps = tuple(replace(step, size=size) for step, size in zip(cascade.steps, sizes, strict=True))
    return replace(cascade, steps=steps, full_size=sizes[-1])


def our_states(
    backbone: Backbone, cascade: Cascade, conditioning: Any, uncond: Any, z: Tensor, generator: torch.Generator
) -> Iterator[Tensor]:
    """The state after each step; a draw of fresh noise for every step, as diffusers' stochastic schedulers make it."""
    x = z * cascade.initial_noise_scale
    for index, step in enumerate(cascade.steps):
        t = torch.full((len(z),), step.t, dtype=torch.float64)
        x0 = backbone.guided_x0(x, t, conditioning, uncond, cascade.guidance_scale, step.size)
        size = cascade.steps[min(index + 1, cascade.num_steps - 1)].size
        noise = torch.randn(len(z), *backbone.latent_shape(size), generator=generator)
        x = advance(cascade, index, x, x0, backbone.schedule, backbone.latent_shape, noise)
        yield x


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    assert torch.isfinite(expected).all(), what
    error = float((actual - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    assert error <= 1e-4, f"{what}: {error:.1e}"


def check_pipeline(
    loaded: Loaded,
    pipeline: Any,
    cascade: Cascade,
    euler: bool = False,
    start: float = 1.0,
    told: Callable[[int], dict[str, Tensor]] = lambda _index: {},
    **options: Any,
) -> None:
    """Run the stock pipeline and ours from the same noise.

    Args:
        euler: the pipeline's latents are `x0 + s eps`, which is ours over alpha.
        start: by which the publication scales the noise that it hands to its pipeline.
        told: what the pipeline is told otherwise from the step behind this one on.
    """
    _, backbone = loaded
    pipeline.set_progress_bar_config(disable=True)
    first = cascade.steps[0].size
    z = torch.randn(2, *backbone.latent_shape(first), generator=torch.Generator().manual_seed(3))
    states: list[Tensor] = []

    def keep(index: int, latents: Tensor) -> None:
        states.append(latents / float((1 + pipeline.scheduler.sigmas[index + 1] ** 2) ** 0.5) if euler else latents)

    if isinstance(pipeline, PixArtAlphaPipeline):
        options["callback"] = lambda index, _timestep, latents: keep(index, latents)
    else:
        options["callback_on_step_end"] = lambda _pipe, index, _t, tensors: (
            keep(index, tensors["latents"]) or told(index)
        )
    with torch.random.fork_rng():
        torch.manual_seed(5)  # SD3's and Wan's pipelines hand their schedulers no generator
        pipeline(
            PROMPTS, latents=start * z, output_type="latent", width=first.width, height=first.height,
            generator=torch.Generator().manual_seed(5), **options,
        )  # fmt: skip
    conditioning = backbone.encode_prompts(PROMPTS)
    uncond = backbone.encode_unconditional(2) if cascade.guidance_scale != 1 else None
    twin = torch.Generator().manual_seed(5)
    assert len(states) == cascade.num_steps
    for index, x in enumerate(our_states(backbone, cascade, conditioning, uncond, z, twin)):
        assert_same(x, states[index], f"{cascade.name}, after step {index}")


def trailing(kind: Any, **options: Any) -> Callable[[Any], Any]:
    """As the cards write it: the base's own scheduler configuration with trailing spacing."""
    return lambda base: kind.from_config(base.config, timestep_spacing="trailing", **options)


def own_config(kind: Any) -> Callable[[Any], Any]:
    return lambda base: kind.from_config(base.config)


PCM = TCDScheduler(num_train_timesteps=1000, timestep_spacing="trailing", **SDXL_TABLE)

# name -> the scheduler that the publication names, and what it passes to the pipeline besides.
SDXL: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "sdxl-turbo": (trailing(EulerAncestralDiscreteScheduler), {}),
    "sdxl-turbo-2": (trailing(EulerAncestralDiscreteScheduler), {}),
    "sdxl-turbo-4": (trailing(EulerAncestralDiscreteScheduler), {}),
    "sdxl-lightning": (trailing(EulerDiscreteScheduler), {}),
    "sdxl-lightning-2": (trailing(EulerDiscreteScheduler), {}),
    "sdxl-lightning-8": (trailing(EulerDiscreteScheduler), {}),
    "hyper-sdxl-2": (trailing(DDIMScheduler), {}),
    "hyper-sdxl-4": (trailing(DDIMScheduler), {}),
    "hyper-sdxl-8": (trailing(DDIMScheduler), {}),
    "hyper-sdxl-8-cfg": (trailing(DDIMScheduler), {"guidance_scale": 5.0}),
    "hyper-sdxl-1": (own_config(LCMScheduler), {"timesteps": [800]}),
    "hyper-sdxl-unified": (own_config(TCDScheduler), {"eta": 1.0}),
    "dmd2-sdxl": (own_config(LCMScheduler), {"timesteps": [999, 749, 499, 249]}),
    "dmd2-sdxl-1": (own_config(LCMScheduler), {"timesteps": [399]}),
    "lcm-sdxl": (own_config(LCMScheduler), {}),
    "lcm-sdxl-8": (own_config(LCMScheduler), {}),
    "tcd-sdxl": (own_config(TCDScheduler), {"eta": 0.3}),
    "pcm-sdxl-2": (lambda _base: PCM, {}),
    "pcm-sdxl-4": (lambda _base: PCM, {}),
    "pcm-sdxl-8": (lambda _base: PCM, {}),
    "pcm-sdxl-4-cfg": (lambda _base: PCM, {"guidance_scale": 7.5}),
    "pcm-sdxl-lcm": (lambda _base: LCMScheduler(), {}),
    "flash-sdxl": (own_config(LCMScheduler), {}),
}


@pytest.mark.parametrize("name", SDXL)
def test_sdxl_students_are_the_stock_pipeline(tiny: Callable[[str], Loaded], name: str) -> None:
    make_scheduler, published = SDXL[name]
    loaded = tiny("sdxl")
    cascade = preset(name)
    pipeline = StableDiffusionXLPipeline.from_pretrained(loaded[0], torch_dtype=torch.float32)
    pipeline.scheduler = make_scheduler(pipeline.scheduler)
    options: dict[str, Any] = {"num_inference_steps": cascade.num_steps, "guidance_scale": 0.0, **published}
    euler = isinstance(pipeline.scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler)
    check_pipeline(loaded, pipeline, at_sizes(cascade, [Size(64, 64)] * cascade.num_steps), euler, **options)


@pytest.mark.parametrize("guidance", [1.0, 8.0])
def test_lcms_whole_unet_with_one_guidance_folded_in_is_the_stock_pipeline_with_it_as_an_input(
    tmp_path: Path, guidance: float
) -> None:
    given = write_tiny_folder("sdxl", tmp_path / "given")
    config = {**json.loads((given / "unet" / "config.json").read_text()), "time_cond_proj_dim": 24}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        unet = UNet2DConditionModel.from_config(config)
    unet.save_pretrained(given / "unet")
    folded = tmp_path / "folded"
    shutil.copytree(given, folded)
    weights, plain = fold_guidance(unet.state_dict(), dict(unet.config), guidance)
    save_file(weights, folded / "unet" / "diffusion_pytorch_model.safetensors")
    (folded / "unet" / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"'lcm-sdxl-unet' does not fit .*fold one guidance in first"):
        check_student("lcm-sdxl-unet", given)
    check_student("lcm-sdxl-unet", folded)

    pipeline = StableDiffusionXLPipeline.from_pretrained(given, torch_dtype=torch.float32)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    loaded = folded, get_backbone("sdxl").load(folded, dtype=torch.float32)
    cascade = at_sizes(preset("lcm-sdxl-unet"), [Size(64, 64)] * 4)
    check_pipeline(loaded, pipeline, cascade, num_inference_steps=4, guidance_scale=guidance)
    if guidance == 8.0:
        with pytest.raises(AssertionError, match="after step 0"):
            check_pipeline(loaded, pipeline, cascade, num_inference_steps=4, guidance_scale=2.0)


def test_folding_a_guidance_refuses_what_has_none() -> None:
    layer = {"time_embedding.linear_1.weight": torch.ones(4, 3), "time_embedding.linear_1.bias": torch.zeros(4)}
    with pytest.raises(BackboneError, match="takes no guidance as an input"):
        fold_guidance(layer, {"time_cond_proj_dim": None}, 8.0)
    with pytest.raises(BackboneError, match=r"lacks the weight 'time_embedding.cond_proj.weight'"):
        fold_guidance(layer, {"time_cond_proj_dim": 8}, 8.0)
    with pytest.raises(BackboneError, match="has shape"):
        fold_guidance({**layer, "time_embedding.cond_proj.weight": torch.ones(2, 8)}, {"time_cond_proj_dim": 8}, 8.0)
    half = {**layer, "time_embedding.cond_proj.weight": torch.ones(3, 8)}
    half["time_embedding.linear_1.bias"] = torch.zeros(4, dtype=torch.float16)
    weights, config = fold_guidance(half, {"time_cond_proj_dim": 8, "other": 1}, 1.0)
    assert config == {"time_cond_proj_dim": None, "other": 1} and "time_embedding.cond_proj.weight" not in weights
    # w = 0: four sines of 0 and four cosines of 1, three times over.
    assert weights["time_embedding.linear_1.bias"].tolist() == [12.0] * 4
    assert weights["time_embedding.linear_1.bias"].dtype == torch.float16


def test_one_step_lightning_gives_x0_as_its_scheduler_says(tmp_path: Path) -> None:
    folder = write_tiny_folder("sdxl", tmp_path / "x0")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "sample"}))
    loaded = folder, get_backbone("sdxl").load(folder, dtype=torch.float32)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.scheduler = trailing(EulerDiscreteScheduler, prediction_type="sample")(pipeline.scheduler)
    cascade = at_sizes(preset("sdxl-lightning-1"), [Size(64, 64)])
    check_pipeline(loaded, pipeline, cascade, True, num_inference_steps=1, guidance_scale=0.0)


@pytest.mark.parametrize(
    ("name", "scheduler", "options"),
    [
        ("pixart-lcm", LCMScheduler, {"guidance_scale": 0.0}),
        ("flash-pixart", LCMScheduler, {"guidance_scale": 0.0}),
        ("pixart-dmd", DDPMScheduler, {"guidance_scale": 1.0, "timesteps": [400]}),
    ],
)
def test_pixart_students_are_the_stock_pipeline(
    tiny: Callable[[str], Loaded], name: str, scheduler: Any, options: dict[str, Any]
) -> None:
    loaded = tiny("pixart")
    cascade = preset(name)
    pipeline = PixArtAlphaPipeline.from_pretrained(loaded[0], torch_dtype=torch.float32)
    table = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    pipeline.scheduler = scheduler(**table, clip_sample=False)
    cascade = at_sizes(cascade, [Size(64, 64)] * cascade.num_steps)
    options = {"clean_caption": False, "use_resolution_binning": False, **options}
    check_pipeline(loaded, pipeline, cascade, num_inference_steps=cascade.num_steps, **options)


@pytest.mark.parametrize(
    ("name", "scheduler", "options"),
    [
        ("sd3.5-large-turbo", FlowMatchEulerDiscreteScheduler, {"guidance_scale": 0.0}),
        ("sd3.5-medium-turbo", FlowMatchEulerDiscreteScheduler, {"guidance_scale": 1.5}),
        ("hyper-sd3-4-cfg", FlowMatchEulerDiscreteScheduler, {"guidance_scale": 3.0}),
        ("hyper-sd3-8-cfg", FlowMatchEulerDiscreteScheduler, {"guidance_scale": 5.0}),
        ("hyper-sd3-16-cfg", FlowMatchEulerDiscreteScheduler, {"guidance_scale": 7.0}),
        ("pcm-sd3", FlowMatchEulerDiscreteScheduler, {"guidance_scale": 1.2, "sigmas": [1.0, 0.76, 0.5, 0.26]}),
        ("pcm-sd3-stochastic", FlowMatchLCMScheduler, {"guidance_scale": 1.2, "sigmas": [1.0, 0.76, 0.5, 0.26]}),
    ],
)
def test_sd3_students_are_the_stock_pipeline(
    tiny: Callable[[str], Loaded], name: str, scheduler: Any, options: dict[str, Any]
) -> None:
    loaded = tiny("sd3")
    cascade = preset(name)
    pipeline = StableDiffusion3Pipeline.from_pretrained(loaded[0], torch_dtype=torch.float32)
    pipeline.scheduler = scheduler(shift=3.0)
    cascade = at_sizes(cascade, [Size(64, 64)] * cascade.num_steps)
    check_pipeline(loaded, pipeline, cascade, num_inference_steps=cascade.num_steps, **options)


@pytest.mark.parametrize(
    ("name", "latent_sides", "sigmas"),
    [
        ("swd-sd3", [8, 10, 12, 16], [1.0, 0.8959, 0.7371, 0.6022]),
        ("swd-sd3-6", [4, 6, 8, 10, 12, 16], [1.0, 0.9454, 0.8959, 0.7904, 0.7371, 0.6022]),
    ],
)
def test_swd_is_the_scale_wise_scheduler_in_the_stock_pipeline(
    tiny: Callable[[str], Loaded], name: str, latent_sides: list[int], sigmas: list[float]
) -> None:
    loaded = tiny("sd3")
    pipeline = StableDiffusion3Pipeline.from_pretrained(loaded[0], torch_dtype=torch.float32)
    pipeline.scheduler = FlowMatchLCMScheduler(
        shift=1.0, scale_factors=[side / latent_sides[0] for side in latent_sides[1:]], upscale_mode="bicubic"
    )
    cascade = at_sizes(preset(name), [Size.square(8 * side) for side in latent_sides])
    check_pipeline(loaded, pipeline, cascade, num_inference_steps=len(sigmas), sigmas=sigmas, guidance_scale=1.0)
    with pytest.raises(AssertionError, match="after step 0"):
        wrong = replace(cascade, x0_upsampling="bilinear")
        check_pipeline(loaded, pipeline, wrong, num_inference_steps=len(sigmas), sigmas=sigmas, guidance_scale=1.0)


class ScaleWiseLCM(LCMScheduler):
    """diffusers' scale-wise scheduler is one of flows alone: this is LCM's with the other's enlargement of x0."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, **_: Any) -> Any:
        """The next state, at the next step's side."""
        denoised = super().step(model_output, timestep, sample, generator=torch.Generator()).denoised
        if self.step_index == len(self.timesteps):
            return (denoised,)
        larger = torch.nn.functional.interpolate(denoised, size=(SWD_SIDES[self.step_index],) * 2, mode="bicubic")
        noise = torch.randn(larger.shape, generator=generator)
        return (self.add_noise(larger, noise, self.timesteps[self.step_index, None]),)


SWD_SIDES = [4, 8, 12, 16]


def test_swd_of_sdxl_is_the_stock_pipeline_with_lcms_scheduler_made_scale_wise(tiny: Callable[[str], Loaded]) -> None:
    """Its publication names a pipeline of its own (quickjkee/swd_pipeline_sdxl) over the stock one and DDPM's table.

    The UNet is told each step's own side: the stock pipeline can be, behind each step.
    """
    loaded = tiny("sdxl")
    sizes = [Size.square(8 * side) for side in SWD_SIDES]
    cascade = at_sizes(preset("swd-sdxl"), sizes)
    pipeline = StableDiffusionXLPipeline.from_pretrained(loaded[0], torch_dtype=torch.float32)
    pipeline.scheduler = ScaleWiseLCM.from_config(pipeline.scheduler.config)

    def told(index: int) -> dict[str, Tensor]:
        side = sizes[min(index + 1, 3)].width
        return {"add_time_ids": torch.tensor([[side, side, 0, 0, side, side]] * 2, dtype=torch.float32)}

    options: dict[str, Any] = {"num_inference_steps": 4, "timesteps": [999, 800, 600, 400], "guidance_scale": 1.0}
    options["callback_on_step_end_tensor_inputs"] = ["latents", "add_time_ids"]
    check_pipeline(loaded, pipeline, cascade, told=told, **options)
    for wrong in (replace(cascade, x0_upsampling="bilinear"), replace(cascade, transition_noise_intensity=0.5)):
        with pytest.raises(AssertionError, match="after step 0"):
            check_pipeline(loaded, pipeline, wrong, told=told, **options)


@pytest.mark.parametrize(
    ("name", "shift", "sigmas"),
    [
        ("lightx2v-wan-14b", 5.0, [1.0, 0.75, 0.5, 0.25]),
        ("rcm-wan-1.3b", 1.0, [0.98765432, 0.93378106, 0.85289539, 0.60897905]),
        ("rcm-wan-14b", 1.0, [0.98765432, 0.93378106, 0.85289539, 0.60897905]),
        ("causvid-wan-1.3b", 1.0, [1.0, 0.757, 0.522]),
    ],
)
def test_wans_step_distilled_students_are_the_stock_pipeline(
    tiny: Callable[[str], Loaded], name: str, shift: float, sigmas: list[float]
) -> None:
    """Each publishes a script of its own that steps as diffusers' LCM of flows does."""

    class Published(FlowMatchLCMScheduler):
        def set_timesteps(self, *_: Any, device: Any = None, **__: Any) -> None:
            """The student's own, since the pipeline hands on a number of steps alone."""
            super().set_timesteps(sigmas=sigmas, device=device)

    loaded = tiny("wan-1.3b")
    size = Size(48, 32, 5)
    cascade = at_sizes(preset(name), [size] * len(sigmas))
    pipeline = WanPipeline.from_pretrained(loaded[0], torch_dtype=torch.float32)
    pipeline.scheduler = Published(shift=shift)
    # 1 but for rCM, whose script scales its noise by the first time.
    options: dict[str, Any] = {"start": sigmas[0], "num_frames": size.num_frames, "guidance_scale": 1.0}
    options["num_inference_steps"] = len(sigmas)
    check_pipeline(loaded, pipeline, cascade, **options)
    with pytest.raises(AssertionError, match="after step 0"):
        check_pipeline(loaded, pipeline, replace(cascade, step_noise_intensity=1.0), **options)


def test_every_student_has_its_oracle() -> None:
    with_pipeline = {
        *SDXL, "lcm-sdxl-unet", "sdxl-lightning-1", "swd-sdxl",
        "pixart-lcm", "flash-pixart", "pixart-dmd",
        "sd3.5-large-turbo", "sd3.5-medium-turbo", "hyper-sd3-4-cfg", "hyper-sd3-8-cfg", "hyper-sd3-16-cfg",
        "pcm-sd3", "pcm-sd3-stochastic", "swd-sd3", "swd-sd3-6",
        "lightx2v-wan-14b", "rcm-wan-1.3b", "rcm-wan-14b", "causvid-wan-1.3b",
    }  # fmt: skip
    students = {name for name, entry in STEP_LISTS.items() if entry.source}
    closed_form = {"rmd-wan", "rmd-wan-shift5"}  # test_reference.py
    assert students == with_pipeline | closed_form


def test_ddims_stochastic_step_is_diffusers() -> None:
    schedule = VariancePreserving.scaled_linear()
    times = [999, 749, 499, 249]
    for eta in (0.0, 0.4, 1.0):
        scheduler = DDIMScheduler(**SDXL_TABLE, clip_sample=False, timestep_spacing="trailing")
        scheduler.set_timesteps(4)
        a = step_noise_intensities("ddim", schedule, times, eta)
        cascade = Cascade.from_steps("ddim", times, [Size.square(64)] * 4, step_noise_intensity=a)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        for index in range(3):
            eps = torch.tanh(x.roll(1, -1))
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(index))
            x0 = schedule.x0_from_eps(x, eps, times[index] / 1000)
            ours = advance(cascade, index, x, x0, schedule, lambda _size: (4, 8, 8), noise)
            theirs = scheduler.step(eps, times[index], x, eta=eta, variance_noise=noise if eta else None).prev_sample
            assert_same(ours, theirs, f"eta {eta}, step {index}")
            x = theirs


def test_noise_rules_have_bounds() -> None:
    flow = RectifiedFlow()
    assert step_noise_intensities("ancestral", flow, [1000, 500, 250]) == (0.0, pytest.approx(1 / 3))
    assert step_noise_intensities("tcd", flow, [1000], 0.3) == 1.0
    with pytest.raises(ValueError, match="noise rule 'heun'"):
        step_noise_intensities("heun", flow, [1000, 500])
    with pytest.raises(ValueError, match="eta"):
        step_noise_intensities("tcd", flow, [1000, 500], 1.5)
