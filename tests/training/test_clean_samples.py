"""Clean samples: below the full size they are encoded from reduced pixels, and pictures bring their own captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import tiny_sizes, write_tiny_folder
from rmd.size import Size
from tests.training.distil_setup import settings_for
from tests.training.picture_setup import four_pictures
from training.distill.clean_samples import clean_samples, read_pictures
from training.distill.prompts import PromptSet
from training.distill.teacher import Teacher
from training.embedded.data.dataset import META_FILE, PIXELS_FILE, RECORDS_FILE, caption

LOW, FULL = tiny_sizes("embedded")
TEXTS = ["a red square", "a blue square"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = write_tiny_folder("embedded", tmp_path_factory.mktemp("teacher") / "embedded")
    backbone = get_backbone("embedded").load(folder, dtype=torch.float32)
    return Teacher(folder, backbone, steps=2, guidance_scale=1.0, cascades={}, default=None)


@pytest.fixture(scope="module")
def prompts(teacher: Teacher) -> PromptSet:
    backbone = teacher.backbone
    return PromptSet(TEXTS, backbone.encode_prompts(TEXTS), backbone.encode_unconditional(1))


def test_a_smaller_scale_is_encoded_from_pixels_reduced_by_area(
    teacher: Teacher, prompts: PromptSet, tmp_path: Path
) -> None:
    settings = settings_for("swd", real_samples=3)
    alone = clean_samples(teacher, prompts, (FULL,), settings, tmp_path)
    scales = clean_samples(teacher, prompts, (LOW, FULL), settings, tmp_path)
    pixels = teacher.backbone.decode(alone.latents[FULL], FULL)
    factor = FULL.height // LOW.height
    means = pixels.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).mean((3, 5))
    vae = teacher.backbone.component_modules()["decoder"].vae
    with torch.no_grad():
        for size, picture in ((LOW, means), (FULL, pixels)):
            torch.testing.assert_close(scales.latents[size], vae.encode(2 * picture - 1), atol=1e-4, rtol=1e-4)
    assert scales.rows.tolist() == alone.rows.tolist()


def test_samples_are_drawn_once_a_run(
    teacher: Teacher, prompts: PromptSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for("swd", real_samples=2)
    first = clean_samples(teacher, prompts, (FULL,), settings, tmp_path)
    monkeypatch.setattr("training.distill.clean_samples.sample", None)
    assert torch.equal(clean_samples(teacher, prompts, (FULL,), settings, tmp_path).latents[FULL], first.latents[FULL])


def picture_folder(folder: Path) -> Path:
    folder.mkdir()
    lines = []
    for name, colour, text in (
        ("b.png", (0, 0, 255), TEXTS[1]),
        ("x.png", (0, 9, 0), "unknown"),
        ("r.png", (255, 0, 0), TEXTS[0]),
    ):
        Image.new("RGB", (96, 64), colour).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_pictures_come_with_the_rows_of_their_captions(tmp_path: Path) -> None:
    load, rows = read_pictures(picture_folder(tmp_path / "pictures"), TEXTS, Size(64, 64))
    assert rows.tolist() == [1, 0]
    assert load(0).shape == (3, 64, 64)
    assert load(0)[:, 0, 0].tolist() == [0, 0, 1] and load(1)[:, 5, 9].tolist() == [1, 0, 0]


def test_pictures_are_encoded_at_every_size(teacher: Teacher, prompts: PromptSet, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pictures")
    settings = settings_for("swd", real_samples=2, real=str(folder))
    samples = clean_samples(teacher, prompts, (LOW, FULL), settings, tmp_path)
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, FULL.height, FULL.width)
    vae = teacher.backbone.component_modules()["decoder"].vae
    with torch.no_grad():
        expected = vae.encode(2 * red - 1)[0]
    torch.testing.assert_close(samples.latents[FULL][samples.rows.tolist().index(0)], expected, atol=1e-4, rtol=1e-4)
    assert samples.latents[LOW].shape[0] == 2


def test_the_training_pictures_of_the_projects_own_data_are_read(tmp_path: Path) -> None:
    pictures = four_pictures()
    np.save(tmp_path / PIXELS_FILE, pictures.rgba)
    (tmp_path / RECORDS_FILE).write_text(json.dumps([record.to_dict() for record in pictures.records]))
    (tmp_path / META_FILE).write_text("{}")
    texts = [caption(record) for record in reversed(pictures.records)]
    load, rows = read_pictures(tmp_path, texts, Size(64, 64))
    # Only two of the four are for training; held-out pictures stay unseen.
    assert rows.tolist() == [3, 2]
    assert load(1)[:, 30, 60].tolist() == [0, 0, 1] and load(0)[:, 32, 32].tolist() == [1, 0, 0]


def test_a_folder_that_cannot_serve_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a folder of `rmd data` nor pictures with a metadata.jsonl"):
        read_pictures(tmp_path, TEXTS, FULL)
    folder = picture_folder(tmp_path / "pictures")
    with pytest.raises(ValueError, match="no picture's caption is among the prompts"):
        read_pictures(folder, ["something else"], FULL)
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "a"}\nb.png\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 2: not"):
        read_pictures(folder, TEXTS, FULL)
