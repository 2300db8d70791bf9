"""One job: the common start, the distillation up to each snapshot, the measurement, the result's file."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from rmd.backbones.base import Backbone
from rmd.cascade import Cascade
from rmd.checkpoint import CASCADE_FILE
from rmd.dtypes import parse_dtype
from rmd.size import Size
from rmd.weight_files import file_digest
from training.distill.prompt_files import caption_prompts
from training.distill.prompts import PromptSet, encode_prompts
from training.distill.roles import fingerprint, trained_parameters, with_weights
from training.distill.run import PRECISIONS, Distillation, initial_denoiser
from training.distill.settings import DistillSettings
from training.distill.sheets import with_denoiser
from training.distill.teacher import Teacher
from training.evaluate.shared.provenance import environment
from training.lab.cost import row_cost, sampling_cost, snapshots, teacher_size
from training.lab.grid import Grid, Job, Row
from training.lab.measure import LabMeasurer
from training.runtime.files import load_tensors, save_tensors, write_json, write_text

SETS_FILE = "sets.json"
STRIPS = "strips"


class JobStoppedError(Exception):
    """The job was asked to stop; what it had is kept, and it goes on from there."""


class BusyError(Exception):
    """Another process makes what this job needs first."""


@dataclass
class Stop:
    """When to stop: at a time of the monotonic clock, or when asked."""

    deadline: float | None = None
    asked: bool = False

    def ask(self) -> None:
        """Stop at the next occasion."""
        self.asked = True

    @property
    def due(self) -> bool:
        """Whether to stop now."""
        return self.asked or (self.deadline is not None and time.monotonic() > self.deadline)

    def check(self) -> None:
        """Raises :class:`JobStoppedError` when it is time."""
        if self.due:
            raise JobStoppedError


@dataclass
class Lab:
    """What the jobs of one process share.

    Attributes:
        root: of everything large: ``starts/``, ``runs/``, ``prompts/``, ``pictures/``.
        results: the small files that are committed.
        teacher_folder: the lab's teacher.
        data: the picture cache at the teacher's side.
    """

    grid: Grid
    root: Path
    results: Path
    teacher_folder: Path
    data: Path
    device: str = "cpu"
    stop: Stop = field(default_factory=Stop)
    say: Callable[[str], None] = print

    # ---- what is loaded once ----------------------------------------------------------------------------------------

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, in the precision of :attr:`Grid.base`."""
        precision = PRECISIONS[self.grid.base.get("precision", "auto")]
        place = torch.device(self.device)
        teacher = Teacher.open(self.teacher_folder, None, parse_dtype(precision, place), place)
        return replace(teacher, steps=self.grid.teacher_steps)

    @cached_property
    def prompts(self) -> PromptSet:
        """The training captions, the same for every training seed."""
        return encode_prompts(
            self.teacher.backbone,
            caption_prompts(self.data),
            self.root / "prompts",
            progress=lambda _share: self.stop.check(),
        )

    @cached_property
    def measurer(self) -> LabMeasurer:
        """The held-out sets; what all rows share of them is written beside the results.

        Raises:
            ValueError: the results there were measured on other sets.
            BusyError: another process computes them.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            # Thousands of features that two processes need not both compute.
            with FileLock(self.root / ".measurer.lock", timeout=0):
                measurer = LabMeasurer(
                    self.grid.evaluation, self.data, self.root / "pictures", self.teacher.backbone, self.stop.check
                )
                self._agree_on_sets(measurer)
        except Timeout:
            raise BusyError("another process computes the real pictures' features") from None
        return measurer

    def _agree_on_sets(self, measurer: LabMeasurer) -> None:
        common = {
            "teacher": self.teacher_fingerprint,
            "full_size": str(self.full),
            "strip": measurer.strip_prompts(),
            "sets": measurer.sets(),
        }
        path = self.results / SETS_FILE
        if not path.is_file():
            write_text(path, json.dumps(common) + "\n")
            return
        kept = json.loads(path.read_text(encoding="utf-8"))
        for name, value in common.items():
            if _identity(kept[name]) != _identity(value):
                raise ValueError(f"{path} has another {name!r} than this grid: give another --results folder")

    @cached_property
    def teacher_fingerprint(self) -> str:
        """Tells two teachers' results apart."""
        return fingerprint(self.teacher.backbone.component_modules()["denoiser"])

    # ---- files ------------------------------------------------------------------------------------------------------

    def result_file(self, job: Job) -> Path:
        """Where the job's result goes; the job is done when it is there."""
        return self.results / f"{job.name}.json"

    def run_folder(self, job: Job) -> Path:
        """The job's checkpoints and snapshots."""
        return self.root / "runs" / job.name

    # ---- the job ----------------------------------------------------------------------------------------------------

    def run(self, job: Job) -> None:
        """Train, measure, write the result.

        Raises:
            JobStoppedError, BusyError: it is not done, and nothing is lost.
        """
        row, cascade = job.row, self.grid.cascade(job.row)
        content: dict[str, Any] = {
            "row": row.key,
            "seed": job.seed,
            "teacher": self.teacher_fingerprint,
            "dtype": str(self.teacher.backbone.dtype).removeprefix("torch."),
            "sampling_cost": round(sampling_cost(self._sampled(cascade, row), self.full), 3),
            **environment(self.device),
        }
        if row.weights == "teacher":
            content["cascade"] = cascade.to_dict()
            content["snapshots"] = {"updates": self._measured(job, cascade, weights=None)}
        elif row.weights == "start":
            content["settings"] = _record(self.grid.start_settings(row, job.seed))
            content["cascade"] = cascade.to_dict()
            content["snapshots"] = {"updates": self._measured(job, cascade, self._start(row, job.seed))}
        else:
            content["settings"] = _record(self.grid.settings(row, job.seed))
            content["cascade"], content["snapshots"] = self._distilled(job)
        write_text(self.result_file(job), json.dumps(content) + "\n")
        shutil.rmtree(self.run_folder(job) / "checkpoints", ignore_errors=True)

    @property
    def full(self) -> Size:
        """The teacher's side."""
        return teacher_size(self.grid)

    def _distilled(self, job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
        points = snapshots(self.grid, job.row)
        cascade = self._train(job, sorted(set(points.values())))
        cost = row_cost(self.grid, job.row)
        found: dict[str, Any] = {}
        for column, updates in points.items():
            if column != "updates" and updates == points["updates"]:
                continue  # the same student
            record = json.loads((self.run_folder(job) / f"weights-{updates:06d}.json").read_text())
            measured = self._measured(job, cascade, self._weights(job, updates), whole=column == "updates")
            found[column] = {**record, "passes_a_sample": round(cost * updates, 1), **measured}
        return cascade.to_dict(), found

    def _weights(self, job: Job, updates: int) -> Path:
        return self.run_folder(job) / f"weights-{updates:06d}.safetensors"

    def _train(self, job: Job, points: list[int]) -> Cascade:
        """Distil up to every snapshot; returns the cascade that the student is sampled with."""
        folder = self.run_folder(job)
        settings = self.grid.settings(job.row, job.seed)
        if job.row.start is not None:
            start = self._start(job.row, job.seed)
            settings = settings.model_copy(update={"initial_student": str(start)})
        distillation = self._build(settings, job.row, folder)
        trainer = distillation.trainer
        trainer.resume()
        before = settings.fake_warmup_iterations + settings.warm_start_iterations
        for updates in points:
            record = folder / f"weights-{updates:06d}.json"
            if record.is_file():
                continue
            self.say(f"{job.name}: update {trainer.progress.iteration} of {before + points[-1]}")
            self._advance(distillation, before + updates)
            student = trained_parameters(distillation.networks.student)
            exported = dict(distillation.student(settings.export_weights == "ema").named_parameters())
            save_tensors({name: exported[name].bfloat16() for name in student}, self._weights(job, updates))
            progress = trainer.progress
            write_json(record, {"updates": updates, "seconds": round(progress.seconds, 1), "devices": progress.devices})
        return distillation.inference_cascade()

    def _advance(self, distillation: Distillation, iterations: int) -> None:
        trainer = distillation.trainer
        trainer.settings = trainer.settings.model_copy(update={"iterations": iterations})

        def on_update(_share: float, _figures: Mapping[str, float]) -> None:
            if self.stop.due:
                trainer.stop()

        trainer.hooks.on_update = on_update
        if not trainer.train():
            self.stop.ask()  # a signal that the trainer itself took
            raise JobStoppedError

    def _build(self, settings: DistillSettings, row: Row, folder: Path) -> Distillation:
        cascade = self.grid.cascade(row)
        teacher = replace(self.teacher, cascades={row.schedule: cascade}, default=row.schedule)
        return Distillation.build(teacher, self.prompts, settings, folder, self.say)

    def _start(self, row: Row, seed: int) -> Path:
        """The checkpoint that all rows of this schedule and training seed go on from."""
        settings = self.grid.start_settings(row, seed)
        parts = [row.schedule, *(f"{name}={value}" for name, value in sorted((row.start or {}).items())), f"s{seed}"]
        folder = self.root / "starts" / "-".join(parts)
        run = folder.with_name(f"{folder.name}-run")
        run.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(run / ".lock", timeout=0):
                if not (folder / CASCADE_FILE).is_file():
                    self.say(f"the common start {folder.name}")
                    distillation = self._build(settings, row, run)
                    distillation.trainer.resume()
                    self._advance(distillation, settings.warm_start_iterations)
                    distillation.export(folder, "link")
                    shutil.rmtree(run / "checkpoints", ignore_errors=True)
        except Timeout:
            raise BusyError(f"another process makes the start {folder.name}") from None
        return folder

    # ---- measuring --------------------------------------------------------------------------------------------------

    def _sampled(self, cascade: Cascade, row: Row) -> Cascade:
        guidance = self.teacher.guidance_scale if row.weights == "teacher" else 1.0
        return replace(cascade, **{"guidance_scale": guidance, **row.sample})

    def _measured(self, job: Job, cascade: Cascade, weights: Path | None, whole: bool = True) -> dict[str, Any]:
        """One snapshot on all sets; ``whole``: with the row's further intensities and its strip of pictures."""
        row = job.row
        backbone, digest = self._student(weights)
        cascade = self._sampled(cascade, row)
        self.say(f"{job.name}: measuring")
        found: dict[str, Any] = {"sets": self.measurer.measure(backbone, digest, cascade)}
        if not whole:
            return found
        for a in row.intensities:
            other = replace(cascade, transition_noise_intensity=a)
            found.setdefault("intensities", {})[f"{a:g}"] = self.measurer.measure(backbone, digest, other)
        if job.seed == self.grid.seeds[0] and self.grid.evaluation.strip:
            self.measurer.strip(backbone, digest, cascade, self.results / STRIPS / f"{row.key}.webp")
        return found

    def _student(self, weights: Path | None) -> tuple[Backbone, str]:
        """The backbone with a snapshot's weights (a file), a start's (a checkpoint folder) or the teacher's (None)."""
        backbone = self.teacher.backbone
        if weights is None:
            return backbone, self.teacher_fingerprint
        if weights.is_dir():
            denoiser = initial_denoiser(self.teacher, str(weights))
            return with_denoiser(backbone, denoiser), fingerprint(denoiser)
        student = with_weights(backbone.component_modules()["denoiser"], load_tensors(weights))
        return with_denoiser(backbone, student), file_digest(weights)


def _record(settings: DistillSettings) -> dict[str, Any]:
    """The settings as a result tells them: where the start lay is nobody's business."""
    return {name: value for name, value in settings.to_record().items() if name != "initial_student"}


def _identity(value: Any) -> Any:
    """What has to agree: of the sets, their pictures' concepts; figures may differ between machines."""
    return {name: entry["concepts"] for name, entry in value.items()} if isinstance(value, dict) else value
