"""Distilling a small decoder: latents made once, losses that fall, runs that go on to the bit, folders that decode."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

from rmd.backbones.registry import load_checkpoint
from rmd.backbones.tiny import tiny_cascades, write_tiny_folder
from rmd.checkpoint import CheckpointFolder
from rmd.sampler import sample
from rmd.size import Size
from training.decoder.export import check_decoder_out
from training.decoder.latents import LatentSource, read_shards, shard_file, write_shards
from training.decoder.losses import PatchDiscriminator, discriminator_loss, feature_maps, perceptual_loss
from training.decoder.measure import compare
from training.decoder.run import DecoderRun
from training.decoder.settings import DecoderSettings
from training.decoder.trainer import DecoderTrainer
from training.evaluate.shared.features import EfficientNetLite0, load_efficientnet_lite0, prepare
from training.runtime.checkpoints import checkpoints

PROMPTS = ["a red fox", "a ship", "an old lighthouse", "a star"]
LOW, FULL = Size(32, 32), Size(64, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder("embedded", tmp_path_factory.mktemp("tiny") / "student")


def source_of(folder: Path, prompts: list[str] = PROMPTS, seed: int = 0) -> LatentSource:
    backbone, checkpoint = load_checkpoint(folder, dtype=torch.float32)
    return LatentSource(backbone, checkpoint.default_cascade, prompts, checkpoint.digest("denoiser"), seed)


def settings_for(**changes: Any) -> DecoderSettings:
    plain: dict[str, Any] = {"iterations": 6, "blocks": (1,), "width": 16, "batch": 4, "warmup": 1, "log_every": 1}
    return DecoderSettings(**{**plain, **changes})


def trainer_for(folder: Path, run: Path, features: EfficientNetLite0 | None = None, **changes: Any) -> DecoderTrainer:
    backbone, _ = load_checkpoint(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    latents = {
        size: torch.randn(8, *backbone.latent_shape(size), generator=generator).bfloat16() for size in (LOW, FULL)
    }
    return DecoderTrainer(
        settings_for(**changes), backbone.component_modules()["decoder"], latents,
        compression=8, identity={"of": "the test"}, run=run, features=features,
    )  # fmt: skip


# ---- latents --------------------------------------------------------------------------------------------------------


def test_latents_are_the_students_own_samples(folder: Path, tmp_path: Path) -> None:
    source = source_of(folder)
    assert write_shards(tmp_path, source, 2, shard=3, batch=2)
    stored = read_shards(tmp_path, range(2))
    assert {size: len(z) for size, z in stored.items()} == {LOW: 6, FULL: 6}
    described = json.loads(shard_file(tmp_path, 1).with_suffix(".json").read_text())
    assert [tuple(entry) for entry in described] == [source.describe(n) for n in (3, 4, 5)]
    assert sorted(source.describe(n)[0] for n in range(4)) == sorted(PROMPTS)
    backbone, cascade = source.backbone, tiny_cascades("embedded")["2+2"]
    text, seed = source.describe(4)
    predictions: list[torch.Tensor] = []
    expected = sample(
        backbone, cascade, backbone.encode_prompts([text]), [seed], None, lambda _i, _s, x0: predictions.append(x0)
    )
    assert torch.allclose(stored[FULL][4].float(), expected[0], atol=0.02 * float(expected.abs().max()))
    assert torch.allclose(stored[LOW][4].float(), predictions[1][0], atol=0.02 * float(expected.abs().max()))


def test_shards_are_made_once_and_an_interrupted_cache_goes_on(folder: Path, tmp_path: Path) -> None:
    source = source_of(folder)
    asked = iter([False, True])
    assert not write_shards(tmp_path, source, 3, shard=2, stopped=lambda: next(asked))
    first = shard_file(tmp_path, 0)
    before = first.stat().st_mtime_ns
    assert not shard_file(tmp_path, 1).exists()
    seen: list[tuple[int, int]] = []
    assert write_shards(tmp_path, source, 3, shard=2, progress=lambda done, total: seen.append((done, total)))
    assert first.stat().st_mtime_ns == before
    assert seen == [(2, 6), (4, 6), (6, 6)]
    whole = tmp_path / "whole"
    write_shards(whole, source, 3, shard=2)
    assert torch.equal(read_shards(whole, range(3))[FULL], read_shards(tmp_path, range(3))[FULL])


def test_latents_of_another_student_are_not_mixed_in(folder: Path, tmp_path: Path) -> None:
    write_shards(tmp_path, source_of(folder), 1, shard=2)
    for other in (source_of(folder, PROMPTS[:2]), source_of(folder, seed=1)):
        with pytest.raises(ValueError, match="another student, schedule, prompts or seed"):
            write_shards(tmp_path, other, 1, shard=2)
    with pytest.raises(FileNotFoundError, match="latents-00001"):
        read_shards(tmp_path, [0, 1])


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_feature_maps_are_the_evaluations_own_network() -> None:
    """The taps end where its feature vector begins: the last block's output, reached by the same preparation."""
    network = load_efficientnet_lite0()
    pictures = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    prepared = prepare(pictures)
    x = F.relu6(network._bn0(network._conv_stem(prepared)))
    maps = feature_maps(network, pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert torch.allclose(maps[0], F.normalize(x, dim=1, eps=1e-4), atol=1e-4)
    for block in network._blocks[:11]:
        x = block(x)
    assert torch.allclose(maps[-1], F.normalize(x, dim=1, eps=1e-4), atol=1e-3)
    assert [m.shape[2] for m in maps] == [112, 112, 56, 28, 14]


def test_the_perceptual_term_is_zero_for_equals_and_grows_with_blur() -> None:
    network = load_efficientnet_lite0().requires_grad_(False)
    picture = torch.zeros(1, 3, 64, 64)
    picture[..., 16:48, 16:48] = 1.0
    assert float(perceptual_loss(network, picture, picture)) == 0.0
    blurs = [F.avg_pool2d(picture, k, 1, k // 2) for k in (3, 9)]
    losses = [float(perceptual_loss(network, blur, picture)) for blur in blurs]
    assert 0 < losses[0] < losses[1]
    drawn = blurs[1].requires_grad_()
    perceptual_loss(network, drawn, picture).backward()
    assert drawn.grad is not None and float(drawn.grad.abs().max()) > 0


def test_a_discriminator_learns_to_tell_sharp_from_blurred() -> None:
    critic = PatchDiscriminator(8)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        sharp = torch.randn(4, 3, 32, 32, generator=generator)
        loss = discriminator_loss(critic(sharp), critic(F.avg_pool2d(sharp, 3, 1, 1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sharp = torch.randn(8, 3, 32, 32, generator=generator)
    with torch.no_grad():
        assert float(critic(sharp).mean()) > float(critic(F.avg_pool2d(sharp, 3, 1, 1)).mean()) + 0.5
    assert float(discriminator_loss(torch.tensor([2.0]), torch.tensor([-2.0]))) == 0.0


# ---- training -------------------------------------------------------------------------------------------------------


def test_the_small_decoder_comes_nearer_to_the_full_one(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_for(folder, tmp_path, iterations=150, noise=0.0, low_share=0.0)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 150 and lines[-1]["iteration"] == 150
    assert lines[-1]["pixel"] < 0.5 * lines[0]["pixel"]
    assert lines[-1]["rate_factor"] == pytest.approx(0.02, abs=0.02)


def test_neighbours_sizes_and_crops(folder: Path, tmp_path: Path) -> None:
    """What a batch holds: a sample as it is, or with noise of at most the asked spread; of either size; cropped."""
    plain = trainer_for(folder, tmp_path, noised_share=0.0, low_share=0.0)
    stored = {tuple(z.flatten()[:16].tolist()) for z in plain.latents[FULL].float()}
    assert all(tuple(z.flatten()[:16].tolist()) in stored for z in plain.draw())
    noised = trainer_for(folder, tmp_path, noised_share=1.0, noise=0.3, low_share=0.0, batch=8)
    distances = torch.cdist(noised.draw().flatten(1), noised.latents[FULL].float().flatten(1)).min(1).values
    spread = distances / (8 * 8 * 8) ** 0.5
    assert 0 < float(spread.max()) < 0.36 and float(spread.std()) > 0.02
    assert trainer_for(folder, tmp_path, low_share=1.0).draw().shape == (4, 8, 4, 4)
    assert trainer_for(folder, tmp_path, crop=5, low_share=0.0).draw().shape == (4, 8, 5, 5)


@pytest.mark.parametrize("options", [{}, {"adversarial": 0.1, "adversarial_from": 0.0}])
def test_a_run_goes_on_to_the_bit(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    whole = trainer_for(folder, tmp_path / "whole", **options)
    whole.train()
    part = trainer_for(folder, tmp_path / "parts", **options)
    part.train(lambda _share, _figures: part.stop() if part.progress.iteration == 3 else None)
    assert not part.finished
    rest = trainer_for(folder, tmp_path / "parts", **options)
    assert rest.resume() and rest.progress.iteration == 3
    rest.train()
    assert rest.finished and rest.progress.pictures == whole.progress.pictures == 24
    for role in ("decoder", "ema", "decoder_optimizer", *(["discriminator"] if options else [])):
        a, b = (
            load_file(checkpoints(tmp_path / name / "checkpoints")[-1] / f"{role}.safetensors")
            for name in ("whole", "parts")
        )
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), role
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_run_of_other_settings_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    trainer_for(folder, tmp_path).train()
    assert trainer_for(folder, tmp_path, iterations=9).resume()  # longer is no other run
    with pytest.raises(ValueError, match=r"other settings \(pixel, width\)"):
        trainer_for(folder, tmp_path, pixel=2.0, width=8).resume()
    other = trainer_for(folder, tmp_path)
    other.identity = {"of": "something else"}
    with pytest.raises(ValueError, match="another decoder or other latents"):
        other.resume()


def test_the_adversarial_term_waits_for_its_share_of_the_run(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_for(folder, tmp_path, adversarial=0.1, adversarial_from=0.5)
    assert trainer.discriminator is not None
    figures = [trainer.update() for _ in range(6)]
    assert ["adversarial" in f for f in figures] == [False, False, False, True, True, True]


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"iterations": None}, "the run has no end"), ({"pixel": 0.0}, "pixel and perceptual are both 0")],
)
def test_settings_that_say_nothing(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings_for(**changes)


# ---- the whole road -------------------------------------------------------------------------------------------------


def test_compare_knows_an_equal_decoder(folder: Path) -> None:
    backbone, _ = load_checkpoint(folder, dtype=torch.float32)
    decoder = backbone.component_modules()["decoder"]
    latents = {FULL: torch.randn(5, *backbone.latent_shape(FULL))}
    found = compare(decoder, decoder, latents, load_efficientnet_lite0(), noise=0.1)["64x64"]
    assert found["psnr"] == found["psnr_noised"] == 80.0 and found["mean_error"] == 0.0  # the limit of equal pictures
    assert found["features_relative_l2"] == 0.0 and found["pictures"] == 5


def command(*arguments: str | Path) -> Any:
    app = typer.Typer()
    app.command()(importlib.import_module("cli.distill_decoder").command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_from_a_checkpoint_to_a_decoder_that_it_names(folder: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(folder, student)
    (student / "NOTICE").write_text("credits")
    job = DecoderRun(student, tmp_path / "run")
    assert job.make_latents(PROMPTS, 4, shard=4)
    trainer = job.train(settings_for(perceptual=0.1))
    assert trainer.finished and [len(z) for z in trainer.latents.values()] == [4, 4]  # the first shard is kept back
    out = tmp_path / "student-decoder"
    record = job.export(trainer, out, use=True)
    assert {"pixel", "perceptual"} <= json.loads(
        (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
    ).keys()
    named = CheckpointFolder.read(student)
    assert named.decoder_path is not None and named.decoder_path.resolve() == out.resolve()
    backbone, _ = load_checkpoint(student, dtype=torch.float32)
    latents = torch.randn(1, *backbone.latent_shape(FULL))
    network = trainer.averaged().to(torch.bfloat16).float()
    with torch.no_grad():
        expected = F.pixel_shuffle(network.decode(latents).sample, 8).mul(0.5).add(0.5).clamp(0, 1)
    assert torch.allclose(backbone.decode(latents, FULL), expected, atol=1e-4)
    card = (out / "README.md").read_text()
    assert f"| 64x64 | 4 | {record['quality']['64x64']['psnr']:.1f} |" in card
    assert "EfficientNet-Lite0 features at five depths (weight 0.1)" in card and "those two columns flatter it" in card
    assert str(tmp_path) not in card and (out / "NOTICE").read_text() == "credits"
    stored = json.loads((out / "decoder.json").read_text())
    assert stored["autoencoder"] == named.digest("vae") and stored["training"]["iterations"] == 6
    other = write_tiny_folder("embedded", tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match="distilled from another autoencoder"):
        load_checkpoint(other, decoder=out)


def test_films_are_sent_to_the_pictures_decoder(tmp_path: Path) -> None:
    films = write_tiny_folder("embedded-video", tmp_path / "films")
    with pytest.raises(ValueError, match="embedded-video takes one that was distilled from embedded"):
        DecoderRun(films, tmp_path / "run")


def test_a_folder_of_something_else_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    result = command("--checkpoint", folder, "--out", folder / "vae", "--prompts", prompts, "--iterations", "1")
    assert isinstance(result.exception, ValueError) and "holds no decoder" in str(result.exception)
    result = command("--checkpoint", folder, "--out", tmp_path / "out", "--prompts", prompts)
    assert isinstance(result.exception, ValueError) and "the run has no end" in str(result.exception)
    check_decoder_out(tmp_path / "absent")


def test_sigterm_saves_and_the_same_command_goes_on(folder: Path, tmp_path: Path) -> None:
    prompts, run = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("\n".join(PROMPTS))
    options: list[str] = [
        "--checkpoint", str(folder), "--out", str(tmp_path / "out"), "--run", str(run), "--prompts", str(prompts),
        "--samples", "1", "--blocks", "1", "--width", "8", "--batch", "2", "--threads", "1", "--iterations",
    ]  # fmt: skip
    start = [sys.executable, "-m", "cli.main", "distill-decoder"]
    process = subprocess.Popen([*start, *options, "1000000"], stdout=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 240
        while not (run / "metrics.jsonl").is_file() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0 and "the same command goes on" in said
    done = json.loads((checkpoints(run / "checkpoints")[-1] / "state.json").read_text())["iteration"]
    assert done > 0
    again = command(*options, str(done + 2))
    assert again.exit_code == 0, again.output
    assert "times as fast; decoder in" in again.output
    assert json.loads((tmp_path / "out" / "decoder.json").read_text())["training"]["iterations"] == done + 2
