"""Puts a distillation together: teacher folder and settings in, run folder and checkpoint folder out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rmd.backbones.registry import get_backbone
from rmd.cascade import Cascade
from rmd.checkpoint import CASCADE_FILE, CheckpointFolder
from training.distill.adapters import learnt_adapters
from training.distill.clean_samples import clean_samples
from training.distill.export import Export, export_checkpoint
from training.distill.methods import METHODS
from training.distill.methods.base import DistributionMatching
from training.distill.prompts import PromptSet
from training.distill.roles import Networks, merged_network, network_of, with_weights
from training.distill.settings import DistillSettings
from training.distill.sheets import draw_pictures, teacher_sampling, with_denoiser, write_sheet
from training.distill.teacher import Teacher, exported_cascades, training_cascade
from training.distill.trainer import Trainer
from training.distill.update import averaged_student
from training.runtime.checkpoints import checkpoints, load_checkpoint
from training.runtime.files import load_tensors, save_tensors, write_json
from training.runtime.sharding import whole

PRECISIONS = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}
INITIAL_FILE = "initial.json"


@dataclass
class Distillation:
    """Everything of one run, put together by :meth:`build`."""

    teacher: Teacher
    method: DistributionMatching
    networks: Networks
    trainer: Trainer
    settings: DistillSettings
    run: Path

    @classmethod
    def build(
        cls,
        teacher: Teacher,
        prompts: PromptSet,
        settings: DistillSettings,
        run: Path,
        say: Callable[[str], None] = lambda _text: None,
        *,
        to_export: bool = False,
        accelerator: Accelerator | None = None,
    ) -> Distillation:
        """Set up method, networks and trainer; draws the teacher's samples where the method needs some.

        Args:
            to_export: nothing is trained, so no samples are needed.
            accelerator: the run's processes; this one alone by default.
        """
        cascade = training_cascade(teacher, settings)
        scale = settings.guidance_scale if settings.guidance_scale is not None else teacher.guidance_scale
        method = METHODS[settings.method](teacher.backbone, cascade, settings, prompts, scale)
        start = settings.initial_student
        initial = None if start is None else initial_denoiser(teacher, start)
        networks = Networks.build(teacher.backbone, settings, initial)
        if method.needs_samples:
            sizes = method.sample_sizes
            samples = None if to_export else clean_samples(teacher, prompts, sizes, settings, run, say, accelerator)
            # In any case: a discriminator's head is among the weights that a checkpoint holds.
            method.attach(networks.fake, samples)
        tokens = teacher.backbone.tokens(cascade.full_size)
        trainer = Trainer(method, networks, settings, run, accelerator=accelerator, tokens=tokens)
        if trainer.accelerator.is_main_process:
            keep_initial_record(settings, run)
        return cls(teacher, method, networks, trainer, settings, run)

    def student(self, averaged: bool = True) -> torch.nn.Module:
        """A copy of the student's denoiser on the CPU with its averaged (or last) weights (:func:`with_weights`)."""
        weights = self.trainer.student_optimizer.master_state()
        if averaged:
            weights = self.trainer.ema.state(weights)
        return with_weights(self.networks.student, weights, self.networks.plain)

    def exported_student(self) -> torch.nn.Module:
        """The student as it is exported: if asked for, the mean of several checkpoints, or of them and the teacher.

        Raises:
            ValueError: fewer checkpoints are kept than asked for, or the teacher has no such weights (LoRA).
        """
        settings = self.settings
        averaged = settings.export_weights == "ema"
        if settings.export_checkpoints == 1 and not settings.export_teacher_share:
            return self.student(averaged)
        kept = checkpoints(self.run / "checkpoints")[-settings.export_checkpoints :]
        if len(kept) < settings.export_checkpoints:
            raise ValueError(
                f"export_checkpoints={settings.export_checkpoints}: {self.run} keeps {len(kept)}; nothing is lost, "
                f"export with --export-only --set export_checkpoints={len(kept)}"
            )
        states = [load_checkpoint(path)[0]["ema" if averaged else "student"] for path in kept]
        mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
        if share := settings.export_teacher_share:
            teacher = dict(self.teacher.backbone.component_modules()["denoiser"].named_parameters())
            if absent := mean.keys() - teacher.keys():
                raise ValueError(f"export_teacher_share: the teacher has no {min(absent)}; it needs lora_rank=0")
            mean = {name: torch.lerp(value, whole(teacher[name]).to(value), share) for name, value in mean.items()}
        return with_weights(self.networks.student, mean, self.networks.plain)

    def _exported_weights(self) -> str:
        settings = self.settings
        count, share = settings.export_checkpoints, settings.export_teacher_share
        several = f", mean of {count} checkpoints" if count > 1 else ""
        return settings.export_weights + several + (f", {share:g} of the teacher's weights" if share else "")

    def inference_cascade(self) -> Cascade:
        """The trained cascade with the noise intensities that are exported."""
        settings, cascade = self.settings, self.method.cascade
        if settings.inference_noise_intensity is not None:
            cascade = replace(cascade, transition_noise_intensity=settings.inference_noise_intensity)
        if settings.inference_step_noise_intensity is not None:
            cascade = replace(cascade, step_noise_intensity=settings.inference_step_noise_intensity)
        return cascade

    def draw_sheet(self, prompts: PromptSet) -> Path:
        """Write `sheets/<iteration>.png`: the teacher's row (drawn once) and the student's.

        Processes that shard the networks draw together, and the first writes.
        """
        backbone, cascade = self.teacher.backbone, self.inference_cascade()
        first, wait = self.trainer.accelerator.is_main_process, self.trainer.accelerator.wait_for_everyone
        teacher_file = self.run / "sheets" / "teacher.safetensors"
        conditioning = prompts.conditioning(torch.arange(len(prompts.texts)))
        uncond = self.method.prompts.unconditional(1)  # the negative prompt of the run's guidance
        text = json.dumps([prompts.texts, self.teacher.steps, self.teacher.guidance_scale, str(cascade.full_size)])
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        rows = load_tensors(teacher_file) if teacher_file.is_file() else {}
        if self.settings.sharding:
            wait()  # all have looked before the first may write
        if key not in rows:
            own = teacher_sampling(backbone, cascade.full_size, self.teacher.steps, self.teacher.guidance_scale)
            teacher = with_denoiser(backbone, self.networks.teacher)
            rows = {key: draw_pictures(teacher, own, conditioning, uncond)}
            if first:
                save_tensors(rows, teacher_file)
        with averaged_student(self.trainer.updater) as student:
            drawn = draw_pictures(with_denoiser(backbone, student), cascade, conditioning, uncond)
        path = self.run / "sheets" / f"{self.trainer.progress.iteration:06d}.png"
        if first:
            write_sheet({"teacher": rows[key], "student": drawn}, prompts.texts, path)
        return path

    def export(self, out: Path, share: str = "copy") -> Path:
        """Write the student as a checkpoint folder (see :mod:`training.distill.export`).

        Processes that shard the networks gather it together, and the first writes.
        """
        settings, progress = self.settings, self.trainer.progress
        first = self.trainer.accelerator.is_main_process
        student = self.exported_student() if first or settings.sharding else None
        if student is None or not first:
            return out
        cascade = self.inference_cascade()
        cascades = exported_cascades(self.teacher, cascade)
        record: dict[str, Any] = {
            "method": settings.method,
            **({"departs from the method": ", ".join(departures)} if (departures := settings.departures()) else {}),
            "weights": self._exported_weights(),
            "iterations": progress.iteration,
            "seconds": round(progress.seconds),
            "device": ", ".join(progress.devices),
            "batch_size": settings.batch_size,
            "guidance_scale": self.method.guidance_scale,
            **({"initial_student": Path(settings.initial_student).name} if settings.initial_student else {}),
            "settings": settings.to_record(),
        }
        if (kept := self.run / INITIAL_FILE).is_file():
            record["initial"] = json.loads(kept.read_text(encoding="utf-8"))
        component, network = network_of(student)
        adapters = learnt_adapters(network) if settings.lora_rank else {}
        return export_checkpoint(
            merged_network(student),
            out,
            Export(
                backbone=self.teacher.backbone.name,
                component=component,
                teacher_folder=self.teacher.folder,
                cascades=cascades,
                default=cascade.schedule_name,
                teacher_steps=self.teacher.steps,
                teacher_guidance=self.teacher.guidance_scale,
                flow_shift=self.teacher.backbone.flow_shift,
                record=record,
                share="link" if share == "link" else "copy",
                adapters=adapters,
                adapted=Path(settings.initial_student or self.teacher.folder),
            ),
        )


def keep_initial_record(settings: DistillSettings, run: Path) -> None:
    """Keep in the run how the student that it starts from was distilled: an export may overwrite that folder."""
    folder = None if settings.initial_student is None else Path(settings.initial_student)
    if folder is not None and (folder / CASCADE_FILE).is_file() and not (run / INITIAL_FILE).is_file():
        write_json(run / INITIAL_FILE, dict(CheckpointFolder.read(folder).distillation))


def initial_denoiser(teacher: Teacher, initial_student: str) -> torch.nn.Module:
    """The denoiser of the folder that a student starts from.

    Raises:
        FileNotFoundError, ValueError: the folder is none, or not of the teacher's kind.
    """
    backbone = get_backbone(teacher.backbone.name).load(
        Path(initial_student), dtype=teacher.backbone.dtype, device=teacher.backbone.device
    )
    denoiser = backbone.component_modules()["denoiser"]
    shapes, own = (
        {name: tuple(value.shape) for name, value in module.state_dict().items()}
        for module in (denoiser, teacher.backbone.component_modules()["denoiser"])
    )
    odd = [name for name in sorted(set(shapes) | set(own)) if shapes.get(name) != own.get(name)]
    if odd:
        raise ValueError(
            f"initial_student {initial_student}: its denoiser is not of the teacher's shape, "
            f"{odd[0]!r} is {shapes.get(odd[0])} there and {own.get(odd[0])} in the teacher"
        )
    return denoiser
