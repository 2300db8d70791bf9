"""A teacher's folder, loaded, and the cascades that a distillation trains and exports from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rmd.backbones.base import Backbone
from rmd.backbones.configs import published_config
from rmd.backbones.family import DiffusersBackbone
from rmd.backbones.folder import DiffusersFolder, read_object
from rmd.backbones.registry import BACKBONES, get_backbone
from rmd.cascade import Cascade
from rmd.checkpoint import CASCADE_FILE, CheckpointFolder
from rmd.presets import NOT_DISTILLED, preset
from rmd.published.hub import HUB_PREFIX, checkpoint_folder, is_hub_name
from rmd.size import Size
from training.distill.settings import DistillSettings

_PIPELINES = {
    "StableDiffusionXLPipeline": "sdxl",
    "PixArtAlphaPipeline": "pixart",
    "StableDiffusion3Pipeline": "sd3",
}


@dataclass(frozen=True)
class Teacher:
    """A teacher folder, loaded.

    Attributes:
        folder: where it lies.
        backbone: with the teacher's weights.
        steps, guidance_scale: how it is sampled.
        cascades: those that its folder stores, if any.
    """

    folder: Path
    backbone: Backbone
    steps: int
    guidance_scale: float
    cascades: dict[str, Cascade]
    default: str | None

    @classmethod
    def open(
        cls,
        folder: Path,
        name: str | None,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        weights: bool = True,
    ) -> Teacher:
        """Load a diffusers folder as a teacher.

        Args:
            name: the backbone; by default what its `cascade.json` or pipeline class says.
            weights: False leaves the networks on the meta device, to plan with.

        Raises:
            ValueError: the backbone cannot be told from the folder.
        """
        if is_hub_name(folder):  # fetched once: the export copies from the same place
            if name is None:
                raise ValueError(f"--teacher {folder}: give --backbone, one of {', '.join(BACKBONES)}")
            kind = get_backbone(name)
            assert issubclass(kind, DiffusersBackbone)
            source = f"{HUB_PREFIX}{str(folder).removeprefix(HUB_PREFIX)}"
            folder = DiffusersFolder.open(source, (*kind.components, *kind.tokenizers, "scheduler")).path
            if (folder / CASCADE_FILE).is_file():
                folder = checkpoint_folder(source)  # whole, as its record is held against it
        checkpoint = CheckpointFolder.read(folder) if (folder / CASCADE_FILE).is_file() else None
        if name is None:
            name = checkpoint.backbone_name if checkpoint else backbone_of(folder)
        backbone = get_backbone(name).load(folder, dtype=dtype, device=device, weights=weights)
        spec = checkpoint.teacher if checkpoint else None
        return cls(
            folder=folder,
            backbone=backbone,
            steps=spec.steps if spec else backbone.teacher_steps,
            guidance_scale=spec.guidance_scale if spec else backbone.teacher_guidance,
            cascades=dict(checkpoint.cascades) if checkpoint else {},
            default=checkpoint.default if checkpoint else None,
        )


def published_teacher(name: str, dtype: torch.dtype) -> Teacher:
    """The public model of a backbone, from its configuration alone: on the meta device, without tokenizers.

    Raises:
        ValueError: no such backbone, or no public model.
    """
    backbone = get_backbone(name).from_config(published_config(name), dtype, "meta")
    return Teacher(Path(name), backbone, backbone.teacher_steps, backbone.teacher_guidance, {}, None)


def backbone_of(folder: Path) -> str:
    """The backbone that a folder's pipeline class stands for.

    Raises:
        ValueError: the index is no JSON object, or its pipeline stands for none or several.
        FileNotFoundError: there is no such index.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{index} does not exist; --teacher must be a diffusers folder")
    pipeline = str(read_object(index).get("_class_name"))
    for name in BACKBONES:
        if pipeline.lower().startswith(name):
            return name
    if pipeline not in _PIPELINES:
        raise ValueError(f"{index}: pipeline {pipeline!r} does not tell the backbone; give --backbone")
    return _PIPELINES[pipeline]


_PUBLISHED = {("dmd2", "sdxl"): "dmd2-sdxl", ("swd", "sdxl"): "swd-sdxl", ("swd", "sd3"): "swd-sd3"}
"""Steps and scales that a method's authors published for a backbone: (method, backbone) -> preset."""


def training_cascade(teacher: Teacher, settings: DistillSettings) -> Cascade:
    """The cascade that the settings ask for: a preset, one of the teacher's folder, or the backbone's own.

    RMD and the naive cascade take the backbone's cascade (2+2 and its like), TDM and DMD2 as many steps at the full
    side, SwD the same times over scales from the low to the full side, unless their authors published a list for the
    backbone and the folder stores no cascade; `timesteps` gives these three other times.

    Raises:
        ValueError: no such preset or schedule, or settings that are made for another backbone.
    """
    if settings.backbone not in (None, teacher.backbone.name):
        raise ValueError(
            f"these settings are made for the backbone {settings.backbone}, and {teacher.folder} is "
            f"{teacher.backbone.name}: give another --config, or --set backbone={teacher.backbone.name}"
        )
    # What is about to be distilled for it needs no note that it was not.
    return replace(_wanted_cascade(teacher, settings), note="")


def _wanted_cascade(teacher: Teacher, settings: DistillSettings) -> Cascade:
    if settings.preset is not None:
        return preset(settings.preset, schedule=settings.schedule, resolution_map=settings.resolution_map)
    published = _PUBLISHED.get((settings.method, teacher.backbone.name))
    if published and settings.schedule is None and settings.timesteps is None and not teacher.cascades:
        return preset(published)
    base = _cascade_named(teacher, settings, settings.schedule)
    if settings.timesteps is not None:
        # Only the times and the sizes' ends are taken from a base: the rest is the method's own.
        base = Cascade.from_steps(
            base.name,
            settings.timesteps,
            [base.steps[0].size] * (len(settings.timesteps) - 1) + [base.full_size],
            flow_shift=base.flow_shift,
            resolution_map="none",
        )
    if settings.method == "swd" and settings.schedule is None:
        return scale_wise(teacher.backbone, base)
    if settings.method in ("tdm", "dmd2") and settings.schedule is None and len(base.sizes) > 1:
        return Cascade.from_steps(
            base.name,
            [step.teacher_timestep for step in base.steps],
            [base.full_size] * base.num_steps,
            flow_shift=base.flow_shift,
        )
    return base


def _cascade_named(teacher: Teacher, settings: DistillSettings, schedule: str | None) -> Cascade:
    stored = teacher.cascades.get(schedule or str(teacher.default))
    if stored is not None and stored.guidance_scale == 1.0 and settings.resolution_map in (None, stored.resolution_map):
        return stored
    if schedule is None and settings.resolution_map is None:
        return teacher.backbone.default_cascade()
    cascade = preset(teacher.backbone.profile, schedule=schedule, resolution_map=settings.resolution_map)
    if cascade.full_size != teacher.backbone.default_cascade().full_size:
        raise ValueError(
            f"{teacher.backbone.name} has no presets at its own sizes: leave schedule and resolution_map out, or put "
            f"the cascade into the teacher's cascade.json"
        )
    return cascade


def scale_wise(backbone: Backbone, base: Cascade) -> Cascade:
    """As many steps as `base`, at evenly spaced sides from its low to its full size, enlarged as SwD does: bicubic."""
    low, full = base.steps[0].size, base.full_size
    count = base.num_steps
    sizes = []
    for index in range(count):
        share = index / max(count - 1, 1)
        sides = [
            round((a + (b - a) * share) / backbone.size_multiple) * backbone.size_multiple
            for a, b in ((low.width, full.width), (low.height, full.height))
        ]
        sizes.append(Size(sides[0], sides[1], full.num_frames))
    return Cascade.from_steps(
        f"{base.name}-swd",
        [step.teacher_timestep for step in base.steps],
        sizes,
        full_size=full,
        resolution_map="none",
        flow_shift=base.flow_shift,
        step_noise_intensity=0.0,
        transition_noise_intensity=0.0,
        x0_upsampling="bicubic",
    )


def exported_cascades(teacher: Teacher, trained: Cascade) -> dict[str, Cascade]:
    """The trained schedule, and the backbone's other splits at the same sizes, which the student can run untrained."""
    cascades = {trained.schedule_name: trained}
    if len(trained.stages) != 2 or trained.num_steps != 4:
        return cascades
    schedule = teacher.backbone.schedule
    timesteps = [step.teacher_timestep for step in trained.steps]
    sizes = trained.sizes
    for counts in ((1, 3), (3, 1), (0, 4)):
        name = "+".join(map(str, counts))
        if name in cascades:
            continue
        cascades[name] = replace(
            Cascade.from_steps(
                trained.name,
                timesteps,
                [sizes[0]] * counts[0] + [sizes[-1]] * counts[1],
                schedule=schedule,
                resolution_map=trained.resolution_map,
                flow_shift=trained.flow_shift,
            ),
            transition_noise_intensity=trained.transition_noise_intensity,
            noise_upsampling=trained.noise_upsampling,
            x0_upsampling=trained.x0_upsampling,
            step_noise_intensity=trained.step_noise_intensity,
            initial_noise_scale=trained.initial_noise_scale,
            final_timestep=trained.final_timestep,
            score_noise_intensity=trained.score_noise_intensity,
            training_noise_intensity=trained.training_noise_intensity,
            training_step_noise_intensity=trained.training_step_noise_intensity,
            note=NOT_DISTILLED,
        )
    return cascades
