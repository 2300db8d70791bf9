"""The film teacher on tiny networks: encoding in shards, learning, stopping, resuming, exporting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rmd.backbones.embedded_video import EmbeddedVideoBackbone
from rmd.backbones.film_transformer import FilmTransformer
from rmd.backbones.registry import load_checkpoint
from rmd.backbones.tiny import write_tiny_folder
from tests.training.film_setup import many_pictures
from training.embedded import film_latents, velocity
from training.embedded.data.films import FilmSource
from training.embedded.film_latents import FilmData, FilmEncoder, captions_of, shard_file, write_shards
from training.embedded.film_run import FilmRun
from training.embedded.film_teacher import FilmTrainer, initial_film_transformer

SIDES = (48, 32)
SETTINGS: dict[str, Any] = {
    "minutes": 1.0, "side": 48, "low_side": 32, "batch": 4, "low_batch": 4, "picture_batch": 4, "warmup_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(film_latents, "SHARD", {"films": 4, "pictures": 6})
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny embedded checkpoint: what encodes, and what the film teacher starts from."""
    folder = write_tiny_folder("embedded", tmp_path_factory.mktemp("model") / "embedded")
    (folder / "NOTICE").write_text("credits")
    return folder


@pytest.fixture(scope="module")
def cache(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    write_shards(folder, FilmSource(many_pictures()), FilmEncoder(model), films=8, pictures=6, sides=SIDES)
    return folder


def job(cache: Path, model: Path, run: Path) -> FilmRun:
    return FilmRun(cache, run, model, log=lambda _line: None)


def trainer(cache: Path, model: Path, run: Path, **settings: Any) -> FilmTrainer:
    from training.embedded.film_teacher import FilmSettings

    empty = torch.zeros(1, 24, 32).bfloat16(), torch.zeros(1, 32).bfloat16()
    return FilmTrainer(FilmSettings(**{**SETTINGS, "initial": model, **settings}), FilmData(cache), empty, run)


def test_shards_hold_films_at_both_sizes_and_their_captions(cache: Path, model: Path) -> None:
    data = FilmData(cache)
    assert data.refresh() == 8
    shard = data.shards["films"][1]
    assert shard["latents_48"].shape == (4, 8, 9, 6, 6) and shard["latents_32"].shape == (4, 8, 9, 4, 4)
    assert data.shards["pictures"][0]["latents_48"].shape == (6, 8, 1, 6, 6)
    source, encoder = FilmSource(many_pictures()), FilmEncoder(model)
    specs = [source.film(i) for i in range(4, 8)]
    assert [spec["caption"] for spec in captions_of(shard_file(cache, "films", 1))] == [s.caption for s in specs]
    assert film_latents.write_prompts(cache) == 8
    assert (cache / "prompts.txt").read_text().splitlines()[4:] == [s.caption for s in specs]
    again = encoder.encode(specs, source.pictures.rgba, SIDES)
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, shard[name])


def test_encoding_goes_on_where_it_stopped(model: Path, tmp_path: Path) -> None:
    source, encoder = FilmSource(many_pictures()), FilmEncoder(model)
    seen: list[int] = []
    write_shards(tmp_path, source, encoder, films=8, pictures=6, sides=SIDES, stopped=lambda: len(seen) > 1,
                 progress=lambda done, _total: seen.append(done))  # fmt: skip
    assert seen == [6, 10]
    with pytest.raises(FileNotFoundError, match="no encoded films"):
        FilmData(tmp_path / "none")
    kept = shard_file(tmp_path, "films", 0)
    before = kept.stat().st_mtime_ns
    write_shards(tmp_path, source, encoder, films=8, pictures=6, sides=SIDES)
    assert kept.stat().st_mtime_ns == before and shard_file(tmp_path, "films", 1).is_file()
    with pytest.raises(ValueError, match="other pictures, rules, sides or seed"):
        write_shards(tmp_path, FilmSource(many_pictures(), seed=3), encoder, films=8, pictures=6, sides=SIDES)


def test_a_running_training_takes_up_new_shards(model: Path, tmp_path: Path) -> None:
    source, encoder = FilmSource(many_pictures()), FilmEncoder(model)
    write_shards(tmp_path, source, encoder, films=4, pictures=6, sides=SIDES)
    data = FilmData(tmp_path)
    write_shards(tmp_path, source, encoder, films=12, pictures=6, sides=SIDES)
    assert data.refresh() == 12


def test_it_starts_as_the_picture_teacher_and_learns(cache: Path, model: Path, tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    pictures = SD3Transformer2DModel.from_pretrained(model / "transformer")
    torch.testing.assert_close(dict(initial_film_transformer(model).named_parameters())["proj_out.weight"],
                               pictures.proj_out.weight)  # fmt: skip
    teacher = trainer(cache, model, tmp_path)
    assert teacher.loss("pictures", full=True, count=4).value < 1e-4  # the target is what it says already
    batches = ((batch.kind, teacher.update(batch)[0]) for batch in (teacher.next_loss() for _ in range(60)))
    films = [loss for kind, loss in batches if kind != "pictures"]
    assert sum(films[-10:]) < 0.9 * sum(films[:10])
    assert sum(teacher.kinds.values()) == teacher.samples == 240
    assert set(teacher.kinds) == {"films_low", "films_full", "pictures"}


def test_a_film_teacher_is_moved_towards_the_pictures_that_it_goes_on_drawing(
    cache: Path, model: Path, tmp_path: Path
) -> None:
    run = job(cache, model, tmp_path / "run")
    run.train(**{**SETTINGS, "initial": model, "minutes": 1e-6, "muon_rate": 0.1, "adam_rate": 0.1})
    film = run.export(tmp_path / "film")
    mixed = trainer(cache, film, tmp_path / "mixed", picture_teacher=model, picture_weight=0.25)
    weights = {name: dict(initial_film_transformer(folder).named_parameters())
               for name, folder in (("film", film), ("pictures", model))}  # fmt: skip
    for name, weight in mixed.master.items():
        share = 0.0 if name == "temporal_embed" else 0.25
        torch.testing.assert_close(weight, torch.lerp(weights["film"][name], weights["pictures"][name], share))
    assert mixed.loss("pictures", full=True, count=4).value > 1e-4  # the picture teacher's velocity is the target
    with pytest.raises(ValueError, match="--picture-teacher"):
        trainer(cache, film, tmp_path / "mixed", picture_weight=0.25)
    assert trainer(cache, film, tmp_path / "mixed").picture_teacher is None


def test_batches_of_some_frames_know_which(cache: Path, model: Path, tmp_path: Path) -> None:
    teacher = trainer(cache, model, tmp_path, thin_share=1.0)
    seen: list[tuple[int, ...]] = []
    teacher.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append((kwargs["hidden_states"].shape[2], *kwargs["frame_numbers"].tolist())),
        with_kwargs=True,
    )
    for _ in range(3):
        teacher.loss("films", full=False, count=2)
    assert all(frames == 5 and list(numbers) == sorted(set(numbers)) for frames, *numbers in seen)
    assert len(set(seen)) > 1


def test_single_frames_of_films_are_drawn_as_pictures(cache: Path, model: Path, tmp_path: Path) -> None:
    teacher = trainer(cache, model, tmp_path, picture_share=0.0, frame_share=1.0, full_share=1.0)
    seen: list[dict[str, Any]] = []
    teacher.model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    teacher.update(teacher.next_loss())
    assert seen[0]["hidden_states"].shape == (4, 8, 1, 6, 6) and "frame_numbers" not in seen[0]
    assert teacher.kinds == {"frames": 4}
    with pytest.raises(ValueError, match="more than all"):
        trainer(cache, model, tmp_path, picture_share=0.5, frame_share=0.6)


def test_times_lean_to_noise_for_films_and_more_at_the_full_size(cache: Path, model: Path, tmp_path: Path) -> None:
    def median(kind: Any, full: bool) -> float:
        return trainer(cache, model, tmp_path).times(4000, kind, full).median().item()

    pictures, low, full = median("pictures", False), median("films", False), median("films", True)
    assert pictures == pytest.approx(0.5, abs=0.02) and pictures < low < full
    assert full / (1 - full) == pytest.approx(1.5 * low / (1 - low), rel=0.02)


def test_a_stopped_run_goes_on_and_exports_a_checkpoint(
    cache: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(velocity, "LOG_STEPS", 1)
    # Budgets so small that each is spent by one step.
    settings = {**SETTINGS, "initial": model, "minutes": 1e-6, "picture_share": 0.0, "full_share": 0.0}
    first = job(cache, model, tmp_path / "run").train(**settings)
    assert first.finished and not (tmp_path / "run" / "train.pid").exists()
    second = job(cache, model, tmp_path / "run")
    resumed = second.train(**{**settings, "minutes": first.seconds / 60 + 1e-6})
    assert (resumed.step, resumed.kinds) == (2, {"films_low": 8})
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2]

    out = second.export(tmp_path / "film")
    backbone, checkpoint = load_checkpoint(out, dtype=torch.float32)
    assert isinstance(backbone, EmbeddedVideoBackbone) and checkpoint.default == "0+50"
    assert checkpoint.distillation["training"]["samples_of"] == resumed.kinds
    stored = dict(backbone.component_modules()["denoiser"].named_parameters())
    for name, value in resumed.ema.items():
        torch.testing.assert_close(stored[f"transformer.{name}"], value.bfloat16().float())
    assert isinstance(initial_film_transformer(out), FilmTransformer)
    assert (out / "NOTICE").read_text() == "credits"

    beside = second.export(model.parent / "film")  # beside the model whose components it shares
    assert (beside / "vae").is_symlink()
    shutil.rmtree(beside)
