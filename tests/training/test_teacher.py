"""Teacher training on tiny networks: learning, stopping, resuming, exporting."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rmd.backbones.autoencoder import EmbeddedAutoencoder
from rmd.backbones.registry import load_checkpoint
from rmd.machine import device_name
from rmd.size import Size
from tests.training.picture_setup import LABELS, four_pictures, tiny_autoencoder
from training.distill.prompt_files import PLAIN_WEIGHT, caption_prompts
from training.embedded.data.dataset import PictureSet
from training.embedded.latents import TEXT_TOKENS, TeacherData, encode_text
from training.embedded.teacher import TeacherSettings, TeacherTrainer, initial_transformer, picture_loss
from training.embedded.teacher_export import teacher_card
from training.embedded.teacher_run import TeacherRun
from training.embedded.teacher_sheets import sheet_prompts
from training.embedded.velocity import is_muon_matrix
from training.runtime.files import save_model

TINY_TRANSFORMER: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 16,
}


@pytest.fixture
def pictures() -> PictureSet:
    return four_pictures()


@pytest.fixture
def cache(tmp_path: Path, pictures: PictureSet) -> Path:
    root = tmp_path / "cache"
    root.mkdir()
    np.save(root / "pictures.npy", pictures.rgba)
    (root / "records.json").write_text(json.dumps([record.to_dict() for record in pictures.records]))
    (root / "meta.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def text_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 16 channels and its word-piece tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("text")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *sorted({w for label in LABELS for w in label.split()})]
    vocabulary = {word: i for i, word in enumerate([*words, "noto", "style", "on", "a", "background", "shape"])}
    tokenizer = BertTokenizerFast(vocab=vocabulary, model_max_length=64)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder, safe_serialization=True)
    return folder


def teacher_data(pictures: int = 2) -> TeacherData:
    g = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).bfloat16()

    captions = torch.arange(1, pictures * 4 + 1).reshape(pictures, 2, 2)
    rows = pictures * 4 + 1
    return TeacherData(
        high=randn(pictures, 2, 8, 4, 4), low=randn(pictures, 2, 8, 2, 2), tokens=randn(rows, 6, 16),
        pooled=randn(rows, 16), captions_of=captions, captions=[str(i) for i in range(rows)],
    )  # fmt: skip


def trainer(run: Path, **settings: Any) -> TeacherTrainer:
    defaults: dict[str, Any] = {"minutes": 1.0, "batch": 4, "low_batch": 4, "warmup_steps": 1}
    return TeacherTrainer(TeacherSettings(**{**defaults, **settings}), teacher_data(), run, TINY_TRANSFORMER)


def test_modulations_are_left_to_adamw(tmp_path: Path) -> None:
    master = trainer(tmp_path).master
    muon = {name for name, p in master.items() if is_muon_matrix(name, p)}
    assert "transformer_blocks.0.attn.to_q.weight" in muon
    assert not any(".norm" in name or "embed" in name or name.startswith("proj_out") for name in muon)
    assert all(master[name].ndim == 2 for name in muon)


def test_the_teacher_learns(tmp_path: Path) -> None:
    job = trainer(tmp_path, drop_text=0.0, adam_rate=3e-3)
    losses = [job.train_step(low=False)[0] for _ in range(80)]
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:10])


def test_a_killed_run_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    for _ in range(3):
        first.train_step(low=True)
    first.seconds = 12.0
    first.save()
    expected = first.train_step(low=False)  # this step is lost with the process

    second = trainer(tmp_path)
    assert second.resume()
    assert (second.step, second.samples, second.seconds) == (3, 12, 12.0)
    assert second.train_step(low=False) == pytest.approx(expected, rel=1e-5)
    for name, value in first.master.items():
        assert torch.allclose(second.master[name], value, atol=1e-6), name
        assert torch.allclose(second.ema[name], first.ema[name], atol=1e-6), name


def test_another_kind_of_device_goes_on_with_new_noise_and_is_recorded(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    first.device, first.devices, first.step = torch.device("cuda"), ["NVIDIA X"], 3  # as if it had run there
    first.save()
    second = trainer(tmp_path)
    assert second.resume()
    assert not torch.equal(second.random.get_state(), first.random.get_state())
    assert not torch.equal(second.random.get_state(), trainer(tmp_path).random.get_state()), (
        "not the first batches again"
    )
    second.settings.minutes = 0.001
    second.train(lambda _: None)
    assert second.devices == ["NVIDIA X", device_name()]


def test_the_card_tells_device_options_and_styles(tmp_path: Path) -> None:
    settings = TeacherSettings(minutes=4.5, batch=512, cooldown_share=0.6, ema_decay=0.998).model_dump(mode="json")
    packages = [{"style": "noto"}, {"style": ""}, {"style": "noto blob"}]
    card = teacher_card({"settings": settings, "device": "NVIDIA X", "pictures": {"packages": packages}})
    assert "rmd train-teacher --device cuda --minutes 4.5 --batch 512 --cooldown-share 0.6 --ema-decay 0.998\n" in card
    assert "style one of noto, noto blob\n" in card
    assert "--device" not in teacher_card({"settings": settings, "device": "some processor"})


def test_a_run_stops_at_its_budget_and_at_sigterm(tmp_path: Path) -> None:
    saved: list[int] = []
    job = trainer(tmp_path, minutes=0.02)
    job.on_save = lambda t: saved.append(t.step)
    job.train(lambda _: None)
    assert job.seconds >= 1.2
    assert saved == [job.step]

    job = trainer(tmp_path, minutes=60.0)
    assert job.resume()
    job.train(lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert job.step % 25 == 0
    again = trainer(tmp_path, minutes=60.0)
    assert again.resume()
    assert again.step == job.step


def test_low_resolution_comes_first_and_rates_fall_at_the_end(tmp_path: Path) -> None:
    job = trainer(tmp_path, minutes=10.0, low_share=0.25, cooldown_share=0.5)
    job.step = 1000
    for minutes, low, factor in ((0, True, 1), (2, True, 1), (3, False, 1), (7.5, False, 0.5), (10, False, 0)):
        job.seconds = 60.0 * minutes
        assert job.in_low_phase is low
        assert job.rate_factor() == pytest.approx(factor)


def test_times_at_the_full_size_are_shifted_towards_noise(tmp_path: Path) -> None:
    job = trainer(tmp_path, full_time_shift=2.0)
    state = job.random.get_state()
    low = job.times(1000, low=True)
    job.random.set_state(state)
    torch.testing.assert_close(job.times(1000, low=False), 2 * low / (1 + low))


def test_a_teacher_starts_from_another_ones_transformer(tmp_path: Path) -> None:
    first = trainer(tmp_path / "first", seed=1)
    first.train_step(low=True)
    first.ema_model().save_pretrained(tmp_path / "teacher" / "transformer")
    second = trainer(tmp_path / "second", seed=2, initial=tmp_path / "teacher")
    for name, value in first.ema.items():
        torch.testing.assert_close(second.master[name].data, value.to(second.dtype).float())
    other = {**TINY_TRANSFORMER, "num_layers": TINY_TRANSFORMER["num_layers"] + 1}
    with pytest.raises(ValueError, match=r"--initial: .* differs from the one configured in \['num_layers'\]"):
        initial_transformer(tmp_path / "teacher", other)


class Constant(torch.nn.Module):
    """Predicts one velocity everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.config = value, SimpleNamespace(patch_size=2)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.full_like(hidden_states, self.value),)


def test_the_loss_of_a_set_is_on_its_white_pictures_and_the_same_at_every_call(tmp_path: Path) -> None:
    data = teacher_data(40)
    data.high[:, 0], data.high[:, 1] = 2.0, 100.0  # the second ground must not be looked at
    # v = eps - 2 of variance 1 and mean -2: the best constant leaves the variance, zero leaves 1 + 4.
    assert picture_loss(Constant(-2.0), data) == pytest.approx(1, abs=0.1)
    assert picture_loss(Constant(0.0), data) == pytest.approx(5, abs=0.3)
    model = trainer(tmp_path).ema_model()
    assert picture_loss(model, data, batch=7) == pytest.approx(picture_loss(model, data, batch=40), rel=1e-2)


def test_captions_match_grounds_and_some_are_dropped(tmp_path: Path) -> None:
    job = trainer(tmp_path, batch=4000, coloured=0.25, drop_text=0.1)
    latents, tokens, pooled = job.draw(low=False)
    data = job.data
    on_white = torch.stack([(latents == data.high[n, 0].float()).flatten(1).all(1) for n in range(2)]).any(0)
    assert 0.7 < on_white.float().mean() < 0.8
    empty = (pooled == data.pooled[0]).all(1)
    assert 0.07 < empty.float().mean() < 0.13
    row = int((data.pooled == pooled[~empty & on_white][0]).all(1).nonzero()[0])
    assert row in data.captions_of[:, 0]
    assert tokens.shape == (4000, 6, 16)


def test_another_transformer_is_not_resumed(tmp_path: Path) -> None:
    trainer(tmp_path).save()
    other = TeacherTrainer(TeacherSettings(), teacher_data(), tmp_path, {**TINY_TRANSFORMER, "num_layers": 1})
    with pytest.raises(ValueError, match="another transformer"):
        other.resume()


def test_a_run_is_not_resumed_as_if_it_had_started_elsewhere(tmp_path: Path) -> None:
    first = trainer(tmp_path / "run")
    first.save()
    first.ema_model().save_pretrained(tmp_path / "teacher" / "transformer")
    with pytest.raises(ValueError, match=r"started from new weights, not from .*teacher: go on with no --initial"):
        trainer(tmp_path / "run", initial=tmp_path / "teacher").resume()


def test_text_is_zero_at_padding_and_pooled_over_the_rest(text_encoder_folder: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(text_encoder_folder)
    encoder = BertModel.from_pretrained(text_encoder_folder).eval()
    tokens, pooled = encode_text(["red circle", ""], tokenizer, encoder)
    assert tokens.shape == (2, TEXT_TOKENS, 16)
    assert (tokens[0, :4].float().abs().sum(-1) > 0).all()
    assert (tokens[0, 4:] == 0).all()
    assert (tokens[1, 2:] == 0).all()
    torch.testing.assert_close(pooled[0].float(), tokens[0, :4].float().mean(0), atol=2e-2, rtol=2e-2)


# ---- the whole run ----------------------------------------------------------------------------------------------


def test_a_run_from_pictures_to_checkpoint_and_its_continuation(
    tmp_path: Path, cache: Path, text_encoder_folder: Path
) -> None:
    run, models = tmp_path / "run", tmp_path / "models"
    save_model(tiny_autoencoder(), run / "autoencoder" / "model")
    lines: list[str] = []
    options: dict[str, Any] = {
        "text_encoder": text_encoder_folder, "log": lines.append, "transformer_config": TINY_TRANSFORMER,
    }  # fmt: skip
    settings: dict[str, Any] = {"batch": 2, "low_batch": 2, "warmup_steps": 1}

    job = TeacherRun(cache, run, models, **options)
    job.prepare(autoencoder_minutes=1.0)
    assert not any("training one" in line for line in lines)
    encoded = TeacherData.load(run / "data")
    assert encoded.high.shape == (2, 3, 8, 16, 16)  # the two training pictures only
    assert encoded.low.shape == (2, 3, 8, 8, 8)
    assert encoded.captions[0] == ""
    plain = [encoded.captions[row] for row in encoded.captions_of[:, 0, 0].tolist()]
    assert plain == ["red circle, noto style", "blue square, noto style"]
    first = job.train(minutes=0.01, **settings).step
    losses = json.loads((run / "losses.jsonl").read_text().splitlines()[-1])
    assert losses.keys() == {"step", "train", "unseen_pair", "unseen_concept"}
    assert (run / "sheets" / f"step-{first:06d}.png").is_file()

    again = TeacherRun(cache, run, models, sheets=False, **options)
    again.prepare(autoencoder_minutes=1.0)
    (run / "data" / "pictures.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="was encoded from other pictures: delete it, or choose another --run"):
        again.prepare(autoencoder_minutes=1.0)
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 1000000}\n')  # as if killed after the last save
    trained = again.train(minutes=0.02, **settings)
    assert trained.step > first
    assert "1000000" not in (run / "log.jsonl").read_text()
    assert any(f"resuming at step {first}" in line for line in lines)

    folder = again.export()
    assert (folder / "vae").is_symlink()
    assert not (folder / "vae").readlink().is_absolute()
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert "CC-BY 4.0" in (models / "embedded" / "NOTICE").read_text()
    assert "optimiser steps: " in (folder / "README.md").read_text()
    assert "_name_or_path" not in (folder / "transformer" / "config.json").read_text()
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_mode & 0o044 == 0o044
    assert not (models / "embedded" / "transformer").exists()

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="is not there; copy it again"):
        TeacherRun(cache, run.with_name("never"), models, **options).prepare(autoencoder_minutes=1.0, initial=broken)

    fresh = TeacherRun(cache, run.with_name("fresh"), models, sheets=False, **options)
    fresh.prepare(autoencoder_minutes=1.0, initial=folder)
    assert not any("training one" in line for line in lines), "a teacher goes on with its own autoencoder"
    file = "diffusion_pytorch_model.safetensors"
    assert (fresh.autoencoder_folder / file).read_bytes() == (folder / "vae" / file).read_bytes()

    foreign = tmp_path / "foreign"
    torch.manual_seed(1)
    save_model(EmbeddedAutoencoder(widths=(8, 8), blocks=(1, 1)), foreign / "autoencoder" / "model")
    with pytest.raises(ValueError, match="is another autoencoder than the one that --initial"):
        TeacherRun(cache, foreign, tmp_path / "others", **options).prepare(autoencoder_minutes=1.0, initial=folder)
    (models / "embedded" / "cascade.json").write_text("{}")  # as if a student had been distilled
    again.export()
    lines.clear()
    for other in (foreign, tmp_path / "new"):
        with pytest.raises(ValueError, match=r"holds a student of another autoencoder.*--models"):
            TeacherRun(cache, other, models, **options).prepare(autoencoder_minutes=1.0)
    assert not any("training one" in line for line in lines), "said before the hours are spent"

    backbone, checkpoint = load_checkpoint(folder)
    assert checkpoint.teacher is not None
    assert (checkpoint.teacher.steps, checkpoint.teacher.guidance_scale) == (50, 3.0)
    assert checkpoint.distillation["training"]["step"] == trained.step
    conditioning = backbone.encode_prompts(["red circle"])
    noise = torch.randn(1, 8, 16, 16)
    x0 = backbone.predict_x0(noise, torch.tensor([0.5]), conditioning, Size.square(128))
    model = trained.ema_model().to(torch.bfloat16)
    with torch.no_grad():
        velocity = model(
            noise.bfloat16(), conditioning["encoder_hidden_states"], conditioning["pooled_projections"],
            torch.tensor([500.0]), return_dict=False,
        )[0]  # fmt: skip
    torch.testing.assert_close(x0, noise - 0.5 * velocity.float())


def test_a_distillation_is_given_captions_of_training_pictures_alone(cache: Path) -> None:
    prompts = caption_prompts(cache)
    assert prompts.count("red circle, noto style") >= PLAIN_WEIGHT
    assert any(prompt.endswith(" background") for prompt in prompts)
    assert not [prompt for prompt in prompts if "dot" in prompt or "line" in prompt], "held out"


def test_sheet_prompts_cover_the_three_splits(pictures: PictureSet) -> None:
    prompts = sheet_prompts(pictures, per_split=1)
    assert [prompt.split for prompt in prompts] == ["train", "unseen_pair", "unseen_concept"]
    assert prompts == sheet_prompts(pictures, per_split=1)


def test_a_run_without_pictures_or_text_encoder_says_what_to_do(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run `rmd data"):
        TeacherRun(tmp_path / "none", tmp_path / "run", tmp_path / "models")
    job = TeacherRun(cache, tmp_path / "run", tmp_path / "models", text_encoder=tmp_path / "nothing")
    save_model(tiny_autoencoder(), job.autoencoder_folder)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.*--text-encoder"):
        job.prepare(autoencoder_minutes=1.0)
    with pytest.raises(ValueError, match="train first"):
        job.export()
    with pytest.raises(FileNotFoundError, match="rmd train-teacher"):
        TeacherData.load(tmp_path / "run" / "data")
