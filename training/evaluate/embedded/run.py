"""The whole evaluation: a checkpoint, its teacher and the picture cache in, tables and contact sheets out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from training.embedded.data.dataset import PictureSet
from training.evaluate.embedded.alignment import Projection, fit_projection, text_features
from training.evaluate.embedded.film_run import evaluate_films
from training.evaluate.embedded.measure import RowResult, SetMeasurer, reference_rows, style_counts
from training.evaluate.embedded.models import EvaluationSettings, Models
from training.evaluate.embedded.report import set_report, write_report
from training.evaluate.embedded.rows import PictureCache, Row, generate, psnr, reconstruct
from training.evaluate.embedded.sets import (
    LARGEST_SET,
    SETS,
    TEST_SETS,
    HeldOutSet,
    composites,
    concept_text,
    held_out_set,
    measured_indices,
)
from training.evaluate.embedded.store import FeatureStore, Report
from training.evaluate.shared.provenance import command_line, environment


def evaluate(settings: EvaluationSettings, report: Report = lambda _what, _share: None) -> dict[str, Any]:
    """Measures every row on the held-out sets and writes ``quality.json`` and ``quality.md``; films likewise.

    Args:
        report: called with what is being done and the share of it that is done.

    Returns:
        the content of ``quality.json``.

    Raises:
        FileNotFoundError: a folder, the picture cache or the feature network is missing.
        ValueError: an unknown row or set, or a set that is too small.
    """
    models = Models(settings)
    if models.media == "video":
        return evaluate_films(models, report)
    wanted = settings.sets or TEST_SETS
    names = [name for name in SETS if name in wanted]
    if len(names) != len(wanted):
        raise ValueError(f"sets {', '.join(wanted)}: give some of {', '.join(SETS)}, each once")
    backbone = models.load("teacher").name
    if backbone != "embedded":
        raise ValueError(
            f"{settings.checkpoint} is of backbone {backbone!r}, and the data set, its autoencoder row and the text "
            f"projection are the embedded models'; only their checkpoints are measured here"
        )
    pictures = PictureSet.load(settings.data)
    cache = PictureCache(settings.cache)
    store = FeatureStore(cache, settings, report)
    rows = models.rows()
    tests = [held_out_set(pictures, name, settings.limit or LARGEST_SET, settings.skip) for name in names]
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
        "report": "quality",
        "command": command_line(),
        **environment(settings.device),
        **models.provenance(),
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
    autoencoder = models.autoencoder()
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
