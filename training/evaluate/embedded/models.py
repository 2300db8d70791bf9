"""What is measured, and the networks that are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from rmd.backbones.base import Backbone
from rmd.backbones.executor import Executor
from rmd.backbones.registry import get_backbone
from rmd.cascade import Cascade
from rmd.checkpoint import CASCADE_FILE, FULL_DECODER, CheckpointFolder, TeacherSpec
from rmd.dtypes import dtype_name, native_dtype
from rmd.presets import from_profile, parse_split
from rmd.profiles import PROFILES
from rmd.weight_files import file_digest, folder_digest
from training.evaluate.embedded.rows import Row, build_rows
from training.evaluate.shared.features import WEIGHTS_SHA256


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured.

    Attributes:
        checkpoint: the student's folder.
        teacher: the teacher's folder; the one that the checkpoint names when None.
        data: the picture cache.
        out: folder of the report.
        cache: folder of generated pictures and features, kept between runs.
        sets: splits to measure on; the test sets when empty. "train" is there to choose among checkpoints without
            looking at those.
        rows: see :func:`training.evaluate.embedded.rows.build_rows`; :meth:`Models.default_rows` when empty.
        seeds: sampling seeds; the teacher takes the first.
        limit: pictures or films of each set; as many as the medium's tables have when None.
        skip: leave out the first so many of each set: what one table measures another run may choose by.
        teacher_steps: instead of the teacher's own.
        overrides: fields of the cascades replaced (``transition_noise_intensity``, ``noise_upsampling``).
        batch: prompts at a time.
        feature_dtype: "float32" or "bfloat16" for EfficientNet-Lite0.
        compile: run the denoiser through torch.compile.
        executor: of a weights folder's networks, such as engines; eager when None.
        decoder: folder of a small decoder for every row, or "full"; what the checkpoint names when None.
        executor_name: for the report and the cache of pictures.
        device: such as "cpu" or "cuda".
    """

    checkpoint: Path
    teacher: Path | None = None
    data: Path = Path("data")
    out: Path = Path("benchmarks/quality")
    cache: Path = Path("runs/evaluate")
    sets: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    limit: int | None = None
    skip: int = 0
    teacher_steps: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 64
    feature_dtype: str = "float32"
    compile: bool = False
    executor: Callable[[Path], Executor] | None = None
    executor_name: str = "eager"
    decoder: str | None = None
    device: str = "cpu"


class Models:
    """The student's and the teacher's networks, loaded when first asked for, with the digests of their weights."""

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings = settings
        folder = settings.checkpoint
        if (folder / CASCADE_FILE).is_file():
            checkpoint = CheckpointFolder.read(folder).with_decoder(settings.decoder)
            self.decoder = checkpoint.decoder_path
            self.backbone_name = checkpoint.backbone_name
            self.cascades: dict[str, Cascade] = dict(checkpoint.cascades)
            self.default = checkpoint.default
            self.teacher = checkpoint.teacher or _teacher_spec(checkpoint.backbone_name)
            teacher_folder = checkpoint.teacher_path if checkpoint.teacher else folder
        else:  # a teacher alone, before anything was distilled from it
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is not a folder; give the path of a checkpoint folder")
            self.backbone_name, self.default = "embedded", "2+2"
            self.decoder = None if settings.decoder in (None, FULL_DECODER) else Path(str(settings.decoder))
            self.cascades = {}
            self.teacher = _teacher_spec("embedded")
            teacher_folder = folder
        kind = get_backbone(self.backbone_name)
        self.media, self.frames_per_second = kind.media, kind.frames_per_second
        profile = PROFILES[kind.profile]
        if self.cascades:  # what it does not store is measured at its own sizes, not at the backbone's
            profile = replace(profile, sizes=self.cascades[self.default].sizes)
        total = sum(parse_split(profile.default_split))
        for first in range(total if len(profile.sizes) > 1 else 1):
            schedule = f"{first}+{total - first}"
            self.cascades.setdefault(schedule, from_profile(profile, schedule=schedule))
        self.folders = {"student": folder, "teacher": settings.teacher or teacher_folder}
        self.dtype = native_dtype(settings.device)
        self._loaded: dict[str, Backbone] = {}

    def default_rows(self) -> tuple[str, ...]:
        """The teacher; the student's cascade, the same without distillation, and as many steps at the full size."""
        split = PROFILES[get_backbone(self.backbone_name).profile].default_split
        naive = [name for name in (split, f"0+{sum(parse_split(split))}") if name in self.cascades]
        return "teacher", f"student-{self.default}", *(f"naive-{name}" for name in naive)

    def rows(self, keys: Sequence[str] = ()) -> list[Row]:
        """The rows ``keys``; without any, those that the settings name, or else :meth:`default_rows`."""
        settings = self.settings
        return build_rows(
            keys or settings.rows or self.default_rows(),
            self.cascades,
            self.load("teacher"),
            self.teacher,
            settings.seeds,
            teacher_steps=settings.teacher_steps,
            overrides=settings.overrides,
        )

    def provenance(self) -> dict[str, Any]:
        """What was measured, as both reports say it."""
        settings = self.settings
        kept = {item.name: getattr(settings, item.name) for item in fields(settings) if item.name != "executor"}
        return {
            "settings": {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()},
            "checkpoint": {"folder": str(settings.checkpoint), "weights": self.digest("student")},
            "decoder": FULL_DECODER if self.decoder is None else str(self.decoder),
            "teacher": {
                **asdict(self.teacher),
                "folder": str(self.folder("teacher")),
                "weights": self.digest("teacher"),
            },
            "features": {
                "network": "EfficientNet-Lite0",
                "weights_sha256": WEIGHTS_SHA256,
                "dtype": settings.feature_dtype,
            },
        }

    def folder(self, weights: str) -> Path:
        """The folder of "student" or "teacher".

        Raises:
            FileNotFoundError: the checkpoint names no teacher, and none was given.
        """
        folder = self.folders[weights]
        if folder is None or not folder.is_dir():
            raise FileNotFoundError(f"the teacher's folder {folder or '(none)'} does not exist; pass --teacher FOLDER")
        return folder

    def load(self, weights: str) -> Backbone:
        """The backbone with those weights, in the device's own dtype."""
        if weights not in self._loaded:
            backbone = get_backbone(self.backbone_name).load(
                self.folder(weights), dtype=self.dtype, device=self.settings.device, decoder=self.decoder
            )
            backbone.sizes = self.cascades[self.default].sizes  # the teacher's own schedule runs at the largest
            if self.settings.compile:
                modules = backbone.component_modules()
                modules["denoiser"].compile(dynamic=False)
            if self.settings.executor is not None:
                backbone.executor = self.settings.executor(self.folder(weights))
            self._loaded[weights] = backbone
        return self._loaded[weights]

    def autoencoder(self) -> Any:
        """The embedded models' full autoencoder: a small decoder has no encoder to go with it."""
        full = self.load("teacher") if self.decoder is None else self._full_teacher()
        return full.component_modules()["decoder"].vae

    def _full_teacher(self) -> Backbone:
        kind = get_backbone(self.backbone_name)
        return kind.load(self.folder("teacher"), dtype=self.dtype, device=self.settings.device)

    def digest(self, weights: str) -> str:
        """sha256 over the digests of denoiser's and autoencoder's weight files; with what runs them, and in what."""
        folder = self.folder(weights)
        files = sorted(
            path for part in ("transformer", "unet", "vae") for path in (folder / part).glob("*.safetensors")
        )
        digest = hashlib.sha256("".join(file_digest(path) for path in files).encode()).hexdigest()
        if self.decoder is not None:
            digest = f"{digest} decoder {folder_digest(self.decoder)}"
        how = [self.settings.executor_name] if self.settings.executor is not None else []
        how += [dtype_name(self.dtype)] if self.dtype != torch.bfloat16 else []
        return " ".join([digest, *how])


def _teacher_spec(backbone_name: str) -> TeacherSpec:
    profile = PROFILES[get_backbone(backbone_name).profile]
    return TeacherSpec(profile.teacher_steps, profile.teacher_guidance, profile.flow_shift)
