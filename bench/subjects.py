"""What is measured: a backbone (from a checkpoint, or with random weights), its schedules and ways of running it."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmd.backbones.base import Backbone, Conditioning, repeat_rows
from rmd.backbones.configs import published_config
from rmd.backbones.decoders import TINY, default_shape, small_decoder_config
from rmd.backbones.family import DiffusersBackbone
from rmd.backbones.folder import DiffusersFolder
from rmd.backbones.random_weights import build_random
from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import tiny_config, tiny_sizes
from rmd.cascade import Cascade, teacher_cascade
from rmd.checkpoint import FULL_DECODER, CheckpointFolder
from rmd.pixels import to_pixels
from rmd.profiles import PROFILES
from rmd.sampler import sample
from rmd.size import Size

IMAGE_SPLITS = ("0+4", "1+3", "2+2", "3+1")
FILM_SPLITS = ("0+6", "3+3")


class _Refusing:
    """An executor that runs nothing."""

    def run(self, component: str, size: Size | None, inputs: Mapping[str, Tensor]) -> Tensor:
        raise RuntimeError(f"{component} is not to be run")


@dataclass(frozen=True)
class Subject:
    """A backbone with the schedules to compare.

    Attributes:
        backbone: loaded.
        teacher: the teacher's whole schedule, guided.
        students: by split, unguided.
        weights: "random", or the checkpoint's folder.
        note: what is missing, "" otherwise.
        small: the same backbone with a small decoder; None where there is none.
        small_decoder: what that is, for the report.
    """

    backbone: Backbone
    teacher: Cascade
    students: Mapping[str, Cascade]
    weights: str
    note: str = ""
    small: Backbone | None = None
    small_decoder: str = ""

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Every size at which a schedule has a step, ascending."""
        return tuple(sorted({size for cascade in (self.teacher, *self.students.values()) for size in cascade.sizes}))

    @property
    def encodes_empty_prompt(self) -> bool:
        """Whether guidance costs the teacher one more encoding: SDXL takes zeros in its place."""
        asked = copy.copy(self.backbone)
        asked.executor = _Refusing()
        try:
            asked.encode_unconditional(1)
        except Exception:  # it got as far as its tokenizer or its text encoder
            return True
        return False


def has_transformers() -> bool:
    """Whether text encoders can be built here."""
    return importlib.util.find_spec("transformers") is not None


def random_subject(name: str, scale: str, dtype: torch.dtype, device: torch.device, text: bool = True) -> Subject:
    """A backbone of its public configuration with random weights.

    Args:
        name: key of the registry.
        scale: "full", or "tiny" for a rehearsal of the same path with small networks of the same classes.
        text: with text encoders.

    Raises:
        ValueError: unknown backbone or scale.
    """
    if scale not in ("full", "tiny"):
        raise ValueError(f"scale {scale!r} is not full or tiny")
    kind = get_backbone(name)
    config = published_config(name) if scale == "full" else tiny_config(name)
    note = ""
    if not text or not has_transformers():
        config = {part: value for part, value in config.items() if not part.startswith("text_encoder")}
    if text and not has_transformers():
        note = "transformers is not installed: text encoding is not measured, end-to-end times leave it out"
    backbone = kind.from_config(config, dtype, device)
    if scale == "tiny":
        backbone.sizes = tiny_sizes(name)
    small, label = _random_small(backbone, dtype, device)
    return Subject(backbone, teacher_cascade(backbone), student_cascades(backbone), "random", note, small, label)


def _random_small(backbone: Backbone, dtype: torch.dtype, device: torch.device) -> tuple[Backbone | None, str]:
    """The backbone with a small decoder of the shape that suits it, and what that is; None for Wan's films."""
    if not isinstance(backbone, DiffusersBackbone) or backbone.small_decoder != TINY:
        return None, ""
    blocks, width = default_shape(backbone.name)
    config = small_decoder_config(backbone.latent_channels, backbone.spatial_compression, blocks, width)
    network = build_random(
        TINY, config, backbone.component_dtype("vae", config | {"force_upcast": False}, dtype), device
    )
    shape = ", ".join(map(str, blocks))
    return backbone.with_small_decoder(network), f"AutoencoderTiny, {width} channels, blocks {shape}, random weights"


def student_cascades(backbone: Backbone) -> dict[str, Cascade]:
    """Students' schedules over the backbone's two largest sizes, by split."""
    profile = PROFILES[backbone.profile]
    low, full = sorted(backbone.sizes)[-2:]
    found: dict[str, Cascade] = {}
    for split in FILM_SPLITS if backbone.media == "video" else IMAGE_SPLITS:
        below, above = (int(part) for part in split.split("+"))
        found[split] = Cascade.from_steps(
            backbone.name,
            profile.teacher_timesteps(below + above),
            [low] * below + [full] * above,
            schedule=backbone.schedule,
            schedule_name=split,
            flow_shift=profile.flow_shift,
            transition_noise_intensity=profile.transition_noise_intensity,
        )
    return found


def checkpoint_subject(
    folder: Path, dtype: torch.dtype, device: torch.device, decoder: Path | str | None = None
) -> Subject:
    """The student of a checkpoint folder, with its own schedules and its teacher's.

    Args:
        decoder: the small decoder beside the full one; what the checkpoint names when None.
    """
    from rmd.backbones.registry import load_checkpoint

    backbone, checkpoint = load_checkpoint(folder, dtype=dtype, device=device, decoder=FULL_DECODER)
    small_path = CheckpointFolder.read(folder).with_decoder(decoder).decoder_path
    if len(checkpoint.default_cascade.sizes) > 1:
        backbone.sizes = checkpoint.default_cascade.sizes
    teacher = checkpoint.teacher
    cascade = teacher_cascade(backbone, teacher.steps if teacher else None)
    if teacher is not None:
        cascade = Cascade.from_dict({**cascade.to_dict(), "guidance_scale": teacher.guidance_scale})
    students = {**student_cascades(backbone), **checkpoint.cascades}
    order = (*IMAGE_SPLITS, *FILM_SPLITS)
    small = None
    if small_path is not None and isinstance(backbone, DiffusersBackbone):
        network = backbone.load_small_decoder(small_path, DiffusersFolder.open(folder), dtype, backbone.device)
        small = backbone.with_small_decoder(network)
    return Subject(
        backbone,
        cascade,
        {split: students[split] for split in order if split in students},
        str(folder),
        small=small,
        small_decoder="" if small_path is None else str(small_path),
    )


class Runner:
    """The calls that are timed, of one subject through one executor.

    Inputs are made once, outside the timing; the noise of whole schedules is made inside, as in real use.

    Args:
        subject: what is run.
        executor: what runs its components.
        backbone: another than the subject's.
        small_executor: what runs the small decoder; None where it is not measured.
        decodes: whether ``executor`` has the full decoder.
    """

    def __init__(
        self,
        subject: Subject,
        executor: Any,
        backbone: Backbone | None = None,
        small_executor: Any = None,
        decodes: bool = True,
    ) -> None:
        self.subject = subject
        self.small_executor, self.decodes = small_executor, decodes
        self.backbone = backbone or subject.backbone
        self.executor = executor

    def _conditions(self, batch: int) -> tuple[Conditioning, Conditioning]:
        return self.backbone.random_conditioning(batch), repeat_rows(self.backbone.random_conditioning(1), batch)

    def _with_executor(self, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            self.backbone.executor = self.executor
            with torch.inference_mode():
                return call()

        return run

    def step(self, size: Size, batch: int, guidance: float) -> Callable[[], Any]:
        """One prediction of x0 at a size; two rows a picture under guidance."""
        backbone = self.backbone
        conditioning, uncond = self._conditions(batch)
        latents = torch.randn(batch, *backbone.latent_shape(size), device=backbone.device)
        t = torch.full((batch,), 0.5, dtype=torch.float64, device=backbone.device)
        return self._with_executor(lambda: backbone.guided_x0(latents, t, conditioning, uncond, guidance, size))

    def schedule(self, cascade: Cascade, batch: int) -> Callable[[], Any]:
        """A whole schedule, from noise to clean latents."""
        conditioning, uncond = self._conditions(batch)
        seeds = list(range(batch))
        return self._with_executor(lambda: sample(self.backbone, cascade, conditioning, seeds, uncond))

    def decode(self, size: Size, batch: int) -> Callable[[], Any]:
        """Latents to pictures or films."""
        latents = torch.randn(batch, *self.backbone.latent_shape(size), device=self.backbone.device)
        return self._with_executor(lambda: self.backbone.decode(latents, size))

    def decode_small(self, size: Size, batch: int) -> Callable[[], Any] | None:
        """The same through the small decoder; None where there is none."""
        small = self.subject.small
        if small is None or self.small_executor is None:
            return None
        latents = torch.randn(batch, *small.latent_shape(size), device=small.device)

        def run() -> Any:
            small.executor = self.small_executor
            with torch.inference_mode():
                return small.decode(latents, size)

        return run

    def package(self, size: Size, batch: int) -> Callable[[], Any] | None:
        """Decoded pictures to the PNG files that a server sends; None for films, and where it is not installed."""
        try:
            from server.front.media import encode_picture
        except ImportError:
            return None
        if self.backbone.media == "video":
            return None
        # Not noise, which no file format makes smaller: soft, as pictures are.
        small = torch.rand(batch, 3, size.height // 16, size.width // 16, device=self.backbone.device)
        shape = (size.height, size.width)
        decoded = torch.nn.functional.interpolate(small, shape, mode="bilinear").to(self.backbone.dtype)
        return lambda: [encode_picture(picture) for picture in to_pixels(decoded)]

    def text(self, batch: int) -> Callable[[], Any] | None:
        """Every text encoder on a full-length prompt; None when the backbone has none."""
        names = [name for name in self.backbone.component_modules() if name.startswith("text_encoder")]
        if not names:
            return None
        inputs = {name: self.backbone.example_inputs(name, None, batch) for name in names}
        return self._with_executor(lambda: [self.backbone.run(name, None, inputs[name]) for name in names])

    def diffusers_loop(self, cascade: Cascade, batch: int, noise: Tensor | None = None) -> Callable[[], Any]:
        """The teacher's schedule as a diffusers pipeline runs it: its scheduler, its network, guidance in one batch.

        Args:
            cascade: one size, guided.
            batch: pictures.
            noise: what to start from; drawn at each call when None.
        """
        scheduler = _diffusers_scheduler(self.backbone, cascade)
        backbone, size = self.backbone, cascade.full_size
        denoiser = backbone.component_modules()["denoiser"]
        conditioning, uncond = self._conditions(batch)
        both = {name: torch.cat([uncond[name], value]) for name, value in conditioning.items()}
        shape = (batch, *backbone.latent_shape(size))
        sizes = backbone.size_conditions(size, 2 * batch)
        scales = hasattr(scheduler, "scale_model_input")

        def loop() -> Tensor:
            scheduler.set_timesteps(cascade.num_steps, device=backbone.device)
            start = torch.randn(shape, device=backbone.device) if noise is None else noise
            latents = start * getattr(scheduler, "init_noise_sigma", 1.0)
            for t in scheduler.timesteps:
                doubled = torch.cat([latents, latents])
                if scales:
                    doubled = scheduler.scale_model_input(doubled, t)
                timestep = t.expand(2 * batch).float()
                output = denoiser(latents=doubled.to(backbone.dtype), timestep=timestep, **both, **sizes)
                without, given = output.float().chunk(2)
                guided = without + cascade.guidance_scale * (given - without)
                latents = scheduler.step(guided, t, latents, return_dict=False)[0]
            return latents

        return self._with_executor(loop)


def _diffusers_scheduler(backbone: Backbone, cascade: Cascade) -> Any:
    import diffusers

    if backbone.prediction == "velocity":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=cascade.flow_shift)
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )


def parameter_bytes(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Bytes of each component's parameters and buffers, tensors that it holds twice counted once."""
    found: dict[str, int] = {}
    for name, module in modules.items():
        seen: dict[int, int] = {}
        for tensor in [*module.parameters(), *module.buffers()]:
            seen[tensor.data_ptr() or id(tensor)] = tensor.numel() * tensor.element_size()
        found[name] = sum(seen.values())
    return found
