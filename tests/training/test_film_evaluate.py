"""The film evaluation on a tiny network of the real class, over a cache of lopsided shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rmd.backbones.tiny import write_tiny_folder
from rmd.dtypes import dtype_name, native_dtype
from tests.training.film_setup import many_pictures
from training.evaluate.embedded import film_run
from training.evaluate.embedded.film_report import film_markdown
from training.evaluate.embedded.films import FILM_TITLES, film_set, read_films
from training.evaluate.embedded.models import EvaluationSettings, Models
from training.evaluate.embedded.rows import PictureCache, build_rows, generate
from training.evaluate.embedded.run import evaluate
from training.evaluate.embedded.sheets import draw_sheets


@pytest.fixture(scope="module", autouse=True)
def few_frames() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(film_run, "FITTED_FRAMES", 40)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    pictures = many_pictures()
    np.save(root / "pictures.npy", pictures.rgba)
    (root / "records.json").write_text(json.dumps([record.to_dict() for record in pictures.records]))
    (root / "meta.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder("embedded-video", tmp_path_factory.mktemp("tiny") / "student")


def settings(checkpoint: Path, data: Path, folder: Path, **changes: Any) -> EvaluationSettings:
    options: dict[str, Any] = {
        "rows": ("teacher", "student-3+3", "naive-3+3"),
        "seeds": (0, 1),
        "limit": 6,
        "teacher_steps": 2,
        "feature_dtype": dtype_name(native_dtype("cpu")),
        **changes,
    }
    return EvaluationSettings(checkpoint, None, data, folder / "out", folder / "cache", **options)


@pytest.fixture(scope="module")
def evaluated(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, evaluate(settings(checkpoint, data, folder))


def test_every_row_has_its_figures_on_every_set(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, content = evaluated
    assert json.loads((folder / "out" / "films.json").read_text())["sets"] == json.loads(json.dumps(content["sets"]))
    assert [entry["set"] for entry in content["sets"]] == ["unseen_pair", "unseen_motion", "unseen_concept"]
    for entry in content["sets"]:
        rows = {row["row"]: row for row in entry["rows"]}
        assert list(rows) == ["originals", "autoencoder", "teacher", "student-3+3", "naive-3+3"]
        originals = rows["originals"]["metrics"]
        assert originals["motion"]["value"] == 1 and originals["way_off"]["value"] < 2
        assert "kid" not in originals, "of a set to itself"
        assert originals["identity"]["value"] > entry["chance"]["identity"]
        student = rows["student-3+3"]
        assert student["evaluations"] == 6 and len(student["by_seed"]["motion"]) == 2
        assert len(student["read"]) == 2 and len(student["read"][0]) == entry["films"] == 6
        for name in ("motion", "text_r1", "text_r5", "kid", "identity", "flicker"):
            assert math.isfinite(student["metrics"][name]["value"]), name
        assert entry["chance"]["text_r1"] == pytest.approx(1 / entry["gallery"])
    text = film_markdown(content)
    assert "synthetic" in text and "not FID" in text and all(FILM_TITLES[e["set"]] in text for e in content["sets"])


def test_a_second_run_draws_nothing_anew(evaluated: tuple[Path, dict[str, Any]], checkpoint: Path, data: Path) -> None:
    folder, content = evaluated
    before = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.npy")}
    assert evaluate(settings(checkpoint, data, folder))["sets"] == content["sets"]
    assert {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.npy")} == before


def test_films_do_not_depend_on_the_batch(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    models = Models(settings(checkpoint, data, tmp_path))
    (row,) = build_rows(["student-3+3"], models.cascades, models.load("teacher"), models.teacher, [0])
    cache = PictureCache(tmp_path / "cache")
    prompts, seeds = ["arrow 1", "arrow 2", "arrow 3"], [1, 2, 3]
    whole = generate(models.load("student"), "w", row.cascade, prompts, seeds, cache, batch=3)
    single = generate(models.load("student"), "w", row.cascade, prompts, seeds, cache, batch=1)
    size = row.cascade.full_size
    assert whole.shape == (3, size.num_frames, size.height, size.width, 3)
    assert np.abs(whole.astype(int) - single.astype(int)).mean() <= 1


def test_strips_and_animation_are_drawn(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    written = draw_sheets(settings(checkpoint, data, tmp_path, sets=("unseen_pair",), rows=()), tmp_path / "docs")
    assert [path.name for path in written] == ["films-pairs.png", "films.gif"]
    with Image.open(written[1]) as animation:
        assert animation.n_frames == Models(settings(checkpoint, data, tmp_path)).load("teacher").full_size.num_frames  # type: ignore[attr-defined]
        assert animation.info["loop"] == 0


def test_sets_of_pictures_alone_are_named(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give some of unseen_pair, unseen_motion, unseen_concept, train"):
        evaluate(settings(checkpoint, data, tmp_path, sets=("valid",)))
    test = film_set(many_pictures(), "train", 4, 48)
    assert read_films(test.originals, test).right.all()
