"""Sources and local metrics in, one table out."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.evaluate.pictures.metrics import METRICS, Metric
from training.evaluate.pictures.report import write_report
from training.evaluate.shared.intervals import bootstrap_mean
from training.evaluate.shared.provenance import command_line, environment
from training.evaluate.shared.sources import Progress, Source, prompts_digest

Scores = NDArray[np.float64]


def available(weights: Path) -> tuple[list[type[Metric]], dict[str, str]]:
    """The metrics whose folders lie in `weights`; and of the others, what to put where.

    Raises:
        FileNotFoundError: none is there.
    """
    found = [metric for metric in METRICS if (weights / metric.key).is_dir()]
    absent = {metric.key: f"{weights / metric.key}: {metric.needs}" for metric in METRICS if metric not in found}
    if not found:
        raise FileNotFoundError(f"{weights} holds no metric's weights. Put in {'; in '.join(absent.values())}")
    return found, absent


def evaluate_pictures(
    sources: Sequence[Source],
    prompts: Sequence[str],
    weights: Path,
    out: Path,
    device: str = "cpu",
    batch: int = 16,
    progress: Progress = lambda _what, _share: None,
) -> dict[str, Any]:
    """Measures the sources and writes ``pictures.json`` and ``pictures.md`` into `out`.

    Args:
        sources: of these prompts; every other one is compared with the first.
        weights: a folder with one folder a metric; what is absent is left out and said.
        batch: pictures at a time.
        progress: called with what is being done and the share of it that is done.

    Returns:
        the content of ``pictures.json``.

    Raises:
        FileNotFoundError: no metric's weights are there.
        ValueError: weights that cannot be read safely, a broken picture, sources of other seeds, or one prompt only.
    """
    found, absent = available(weights)
    seeds = list(sources[0].files)
    for source in sources:
        if list(source.files) != seeds:
            raise ValueError(f"{source.name} has sampling seeds {list(source.files)}, {sources[0].name} has {seeds}")
    scores: dict[str, list[Scores]] = {}
    metrics: dict[str, Any] = {}
    for kind in found:  # one network at a time
        metric = kind(weights / kind.key, device)
        metrics[kind.key] = metric.provenance()
        scores[kind.key] = [_scores(metric, source, prompts, batch, progress) for source in sources]
        del metric
        gc.collect()
    content: dict[str, Any] = {
        "report": "pictures",
        "command": command_line(),
        **environment(device),
        "prompts": {"count": len(prompts), "sha256": prompts_digest(prompts)},
        "seeds": seeds,
        "metrics": metrics,
        "absent": absent,
        "rows": [
            {
                "row": source.name,
                "made": dict(source.made),
                "metrics": {key: _row(rows[place]) for key, rows in scores.items()},
                "scores": {key: rows[place].round(5).tolist() for key, rows in scores.items()},
            }
            for place, source in enumerate(sources)
        ],
        "differences": [
            {
                "row": source.name,
                "reference": sources[0].name,
                "metrics": {key: _difference(rows[place], rows[0]) for key, rows in scores.items()},
            }
            for place, source in enumerate(sources)
            if place > 0
        ],
    }
    write_report(out, content)
    return content


def _scores(metric: Metric, source: Source, prompts: Sequence[str], batch: int, progress: Progress) -> Scores:
    """(seeds, prompts)."""
    rows = []
    for seed, paths in source.files.items():
        values: list[float] = []
        for start in range(0, len(paths), batch):
            pictures = [_read(path) for path in paths[start : start + batch]]
            values += metric.score(pictures, prompts[start : start + batch]).tolist()
            progress(f"{metric.title}: {source.name}, seed {seed}", len(values) / len(paths))
        rows.append(values)
    return np.array(rows)


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} is no picture: {error}") from error


def _row(scores: Scores) -> Mapping[str, Any]:
    return {**bootstrap_mean(scores.mean(0)).to_dict(), "by_seed": scores.mean(1).tolist()}


def _difference(scores: Scores, reference: Scores) -> Mapping[str, Any]:
    """Paired by prompt and sampling seed."""
    pairs = scores - reference
    better = float((pairs > 0).mean() + (pairs == 0).mean() / 2)
    return {**bootstrap_mean(pairs.mean(0)).to_dict(), "better": better}
