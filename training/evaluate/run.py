"""The whole evaluation: a checkpoint, its teacher and the picture cache in, tables and contact sheets out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmd.backbones.base import Backbone, Executor
from rmd.backbones.registry import get_backbone
from rmd.cascade import Cascade
from rmd.checkpoint import CASCADE_FILE, CheckpointFolder, TeacherSpec, file_digest
from rmd.dtypes import dtype_name, native_dtype
from rmd.presets import preset
from rmd.profiles import PROFILES
from training.data.dataset import PictureSet
from training.evaluate.alignment import Projection, fit_projection, text_features
from training.evaluate.features import WEIGHTS_SHA256, extract_features, load_efficientnet_lite0
from training.evaluate.measure import RowResult, SetMeasurer, reference_rows, style_counts
from training.evaluate.report import command_line, environment, set_report, write_report
from training.evaluate.rows import DEFAULT_ROWS, PictureCache, Pictures, Row, build_rows, generate, psnr, reconstruct
from training.evaluate.sets import (
    LARGEST_SET,
    SETS,
    TEST_SETS,
    HeldOutSet,
    composites,
    concept_text,
    held_out_set,
    measured_indices,
)

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured.

    Attributes:
        checkpoint: the student's folder.
        teacher: the teacher's folder; the one that the checkpoint names when None.
        data: the picture cache.
        out: folder of the report.
        cache: folder of generated pictures and features, kept between runs.
        sets: splits to measure on. "train" is there to choose among checkpoints without looking at the test sets.
        rows: see :func:`training.evaluate.rows.build_rows`.
        seeds: sampling seeds; the teacher takes the first.
        limit: pictures of each set.
        skip: leave out the first so many of each set: what one table measures another run may choose by.
        teacher_steps: instead of the teacher's own.
        overrides: fields of the cascades replaced (``transition_noise_intensity``, ``noise_upsampling``).
        batch: prompts at a time.
        feature_dtype: "float32" or "bfloat16" for EfficientNet-Lite0.
        compile: run the denoiser through torch.compile.
        executor: of a weights folder's networks, such as engines; eager when None.
        executor_name: for the report and the cache of pictures.
        device: such as "cpu" or "cuda".
    """

    checkpoint: Path
    teacher: Path | None = None
    data: Path = Path("data")
    out: Path = Path("benchmarks/quality")
    cache: Path = Path("runs/evaluate")
    sets: tuple[str, ...] = TEST_SETS
    rows: tuple[str, ...] = DEFAULT_ROWS
    seeds: tuple[int, ...] = (0, 1, 2)
    limit: int = LARGEST_SET
    skip: int = 0
    teacher_steps: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 64
    feature_dtype: str = "float32"
    compile: bool = False
    executor: Callable[[Path], Executor] | None = None
    executor_name: str = "eager"
    device: str = "cpu"


class Models:
    """The student's and the teacher's networks, loaded when first asked for, with the digests of their weights."""

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings = settings
        folder = settings.checkpoint
        if (folder / CASCADE_FILE).is_file():
            checkpoint = CheckpointFolder.read(folder)
            self.backbone_name = checkpoint.backbone_name
            self.cascades: dict[str, Cascade] = dict(checkpoint.cascades)
            self.default = checkpoint.default
            self.teacher = checkpoint.teacher or _teacher_spec(checkpoint.backbone_name)
            teacher_folder = checkpoint.teacher_path if checkpoint.teacher else folder
        else:  # a teacher alone, before anything was distilled from it
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is not a folder; give the path of a checkpoint folder")
            self.backbone_name, self.default = "embedded", "2+2"
            self.cascades = {}
            self.teacher = _teacher_spec("embedded")
            teacher_folder = folder
        for schedule in ("0+4", "1+3", "2+2", "3+1"):
            self.cascades.setdefault(schedule, preset(get_backbone(self.backbone_name).profile, schedule=schedule))
        self.folders = {"student": folder, "teacher": settings.teacher or teacher_folder}
        self.dtype = native_dtype(settings.device)
        self._loaded: dict[str, Backbone] = {}

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
                self.folder(weights), dtype=self.dtype, device=self.settings.device
            )
            backbone.sizes = self.cascades[self.default].sizes  # the teacher's own schedule runs at the largest
            if self.settings.compile:
                modules = backbone.component_modules()
                modules["denoiser"].compile(dynamic=False)
            if self.settings.executor is not None:
                backbone.executor = self.settings.executor(self.folder(weights))
            self._loaded[weights] = backbone
        return self._loaded[weights]

    def digest(self, weights: str) -> str:
        """sha256 over the digests of denoiser's and autoencoder's weight files; with what runs them, and in what."""
        folder = self.folder(weights)
        files = sorted(
            path for part in ("transformer", "unet", "vae") for path in (folder / part).glob("*.safetensors")
        )
        digest = hashlib.sha256("".join(file_digest(path) for path in files).encode()).hexdigest()
        how = [self.settings.executor_name] if self.settings.executor is not None else []
        how += [dtype_name(self.dtype)] if self.dtype != torch.bfloat16 else []
        return " ".join([digest, *how])


def _teacher_spec(backbone_name: str) -> TeacherSpec:
    profile = PROFILES[get_backbone(backbone_name).profile]
    return TeacherSpec(profile.teacher_steps, profile.teacher_guidance, profile.flow_shift)


class FeatureStore:
    """EfficientNet-Lite0 features of pictures, cached by the pictures' bytes."""

    def __init__(self, cache: PictureCache, settings: EvaluationSettings, report: Report) -> None:
        if settings.feature_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"feature_dtype {settings.feature_dtype!r} is not float32 or bfloat16")
        self.cache = cache
        self.device, self.dtype = settings.device, settings.feature_dtype
        self.report = report
        self._network: Any = None

    def of(self, pictures: Pictures) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 1280) float32."""
        digest = hashlib.sha256(pictures.tobytes()).hexdigest()
        network = {"weights": WEIGHTS_SHA256, "dtype": self.dtype}
        path = self.cache.path("features", {"pictures": digest, "shape": pictures.shape, "network": network})
        kept = self.cache.load(path)
        if kept is None:
            if self._network is None:
                self._network = load_efficientnet_lite0(device=self.device, dtype=getattr(torch, self.dtype))
            chunks: Iterator[Pictures] = (pictures[start : start + 32] for start in range(0, len(pictures), 32))
            kept = extract_features(self._network, chunks).numpy()
            self.cache.save(path, kept)
        return torch.from_numpy(kept)

    def of_set(self, pictures: PictureSet, indices: Sequence[int]) -> Tensor:
        """Features of real pictures over white, (len(indices), 1280)."""
        parts: list[Tensor] = []
        for batch in composites(pictures, indices, 256):
            parts.append(self.of(batch))
            self.report("features of the real pictures", len(parts) * 256 / max(1, len(indices)))
        return torch.cat(parts)


def evaluate(settings: EvaluationSettings, report: Report = lambda _what, _share: None) -> dict[str, Any]:
    """Measures every row on both held-out sets and writes ``quality.json`` and ``quality.md``.

    Args:
        report: called with what is being done and the share of it that is done.

    Returns:
        the content of ``quality.json``.

    Raises:
        FileNotFoundError: a folder, the picture cache or the feature network is missing.
        ValueError: an unknown row or set, or a set that is too small.
    """
    names = [name for name in SETS if name in settings.sets]
    if not names or len(names) != len(settings.sets):
        raise ValueError(f"sets {', '.join(settings.sets)}: give some of {', '.join(SETS)}, each once")
    models = Models(settings)
    backbone = models.load("teacher").name
    if backbone != "embedded":
        raise ValueError(
            f"{settings.checkpoint} is of backbone {backbone!r}, and the data set, its autoencoder row and the text "
            f"projection are the embedded model's; only its checkpoints are measured here"
        )
    pictures = PictureSet.load(settings.data)
    cache = PictureCache(settings.cache)
    store = FeatureStore(cache, settings, report)
    rows = build_rows(
        settings.rows,
        models.cascades,
        models.load("teacher"),
        models.teacher,
        settings.seeds,
        teacher_steps=settings.teacher_steps,
        overrides=settings.overrides,
    )
    tests = [held_out_set(pictures, name, settings.limit, settings.skip) for name in names]
    train = pictures.indices("train")
    train_features = store.of_set(pictures, train)  # of all: any of them may have been copied
    position = {index: row for row, index in enumerate(train)}
    # Fitted on the measured styles alone, so that a table does not move with the sets that are only trained on.
    fitted = measured_indices(pictures, "train")
    fitted_features = train_features[torch.tensor([position[i] for i in fitted])]
    projection, texts, row_of = _text_alignment(models, pictures, fitted, fitted_features, tests)

    entries: list[dict[str, Any]] = []
    for test in tests:
        real = store.of_set(pictures, test.indices)
        gallery = texts[torch.tensor([row_of[text] for text in test.texts])]
        measurer = SetMeasurer(test, real, train_features, projection, gallery)
        held = {index: row for row, index in enumerate(test.indices)}

        def features_of(indices: Sequence[int], held: dict[int, int] = held, real: Tensor = real) -> Tensor:
            known = {**{i: train_features[position[i]] for i in indices if i in position},
                     **{i: real[held[i]] for i in indices if i in held}}  # fmt: skip
            absent = [i for i in indices if i not in known]
            if absent:
                known.update(zip(absent, store.of_set(pictures, absent), strict=True))
            return torch.stack([known[i] for i in indices])

        floor, results = reference_rows(measurer, pictures, features_of)
        results.append(_autoencoder_row(models, measurer, pictures, store))
        for row in rows:
            results.append(_generated_row(models, row, measurer, cache, store, report))
        entries.append(set_report(test.name, style_counts(test), len(test.concepts), measurer.chance(), floor, results))
    content: dict[str, Any] = {
        "command": command_line(),
        **environment(settings.device),
        "settings": _plain(settings),
        "checkpoint": {"folder": str(settings.checkpoint), "weights": models.digest("student")},
        "teacher": {
            **asdict(models.teacher),
            "folder": str(models.folder("teacher")),
            "weights": models.digest("teacher"),
        },
        "features": {
            "network": "EfficientNet-Lite0",
            "weights_sha256": WEIGHTS_SHA256,
            "dtype": settings.feature_dtype,
        },
        "text_alignment": {"penalty": projection.penalty, "training_pictures": len(fitted)},
        "nearest_training": {"training_pictures": len(train)},
        "cascades": {row.key: row.cascade.to_dict() for row in rows},
        "sets": entries,
    }
    write_report(settings.out, content)
    return content


def _text_alignment(
    models: Models, pictures: PictureSet, train: Sequence[int], features: Tensor, tests: Sequence[HeldOutSet]
) -> tuple[Projection, Tensor, dict[str, int]]:
    backbone = models.load("teacher")
    records = [pictures.records[i] for i in train]
    described = [concept_text(record) for record in records]
    everything = [*described, *(text for test in tests for text in test.texts)]
    texts, row_of = text_features(everything, lambda batch: backbone.encode_prompts(batch)["pooled_projections"])
    rows = torch.tensor([row_of[label] for label in described])
    return fit_projection(features, texts[rows], [record.base_hexcode for record in records]), texts, row_of


def _autoencoder_row(models: Models, measurer: SetMeasurer, pictures: PictureSet, store: FeatureStore) -> RowResult:
    autoencoder = models.load("teacher").component_modules()["decoder"].vae
    originals = list(composites(pictures, measurer.test.indices))
    copies = [reconstruct(autoencoder, batch) for batch in originals]
    features = torch.cat([store.of(batch) for batch in copies])
    result = measurer.measure("autoencoder", "autoencoder alone (the ceiling of any model on its latents)", [features])
    decibels = sum(psnr(a, b) * len(a) for a, b in zip(originals, copies, strict=True)) / len(measurer.test.indices)
    result.note = f"The autoencoder reconstructs the {measurer.test.name.replace('_', ' ')}s at {decibels:.1f} dB."
    return result


def _generated_row(
    models: Models,
    row: Row,
    measurer: SetMeasurer,
    cache: PictureCache,
    store: FeatureStore,
    report: Report,
) -> RowResult:
    test = measurer.test
    total, done = len(test.prompts) * len(row.seeds), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report(f"{test.name}: {row.key}", done / total)

    features: list[Tensor] = []
    for seed in row.seeds:
        drawn = generate(
            models.load(row.weights),
            models.digest(row.weights),
            row.cascade,
            test.prompts,
            test.seeds(seed),
            cache,
            batch=models.settings.batch,
            progress=advance,
        )
        features.append(torch.cat([store.of(drawn[start : start + 64]) for start in range(0, len(drawn), 64)]))
    return measurer.measure(row.key, row.title, features, row.evaluations)


def _plain(settings: EvaluationSettings) -> dict[str, Any]:
    data = {item.name: getattr(settings, item.name) for item in fields(settings) if item.name != "executor"}
    return {name: str(value) if isinstance(value, Path) else value for name, value in data.items()}
