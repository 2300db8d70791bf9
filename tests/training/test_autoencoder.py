"""Autoencoder training on a tiny network: losses, learning, resuming, stored statistics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rmd.backbones.autoencoder import EmbeddedAutoencoder
from tests.training.picture_setup import four_pictures, tiny_autoencoder
from training.embedded.autoencoder import (
    AutoencoderConfig,
    flatten_pictures,
    measure,
    psnr,
    reconstruction_loss,
    train_autoencoder,
    upsample_twice,
)
from training.embedded.data.dataset import PictureSet


@pytest.fixture
def pictures() -> PictureSet:
    return four_pictures()


def test_reconstruction_loss_counts_pixels_and_edges() -> None:
    target = torch.zeros(1, 1, 4, 4)
    assert reconstruction_loss(target, target) == 0
    assert reconstruction_loss(target + 0.5, target) == pytest.approx(0.5)  # a flat error has no edges
    step = target.clone()
    step[..., 2:] = 1.0
    assert reconstruction_loss(step, target) == pytest.approx(0.5 + 1 / 3)


def test_psnr_of_a_known_error() -> None:
    target = torch.zeros(2, 3, 8, 8)
    assert psnr(target + 0.2, target) == pytest.approx(20.0, abs=1e-4)  # 0.1 of the range


def test_pictures_are_flattened_over_white_and_over_colours() -> None:
    rgba = torch.zeros(64, 8, 8, 4, dtype=torch.uint8)
    assert torch.equal(flatten_pictures(rgba, None, 4), torch.ones(64, 3, 4, 4))
    coloured = flatten_pictures(rgba, torch.Generator().manual_seed(0), 8)
    white = (coloured == 1).all(1).all(1).all(1).float().mean()
    assert 0.25 < white < 0.75


def test_the_autoencoder_learns_resumes_and_stores_its_statistics(tmp_path: Path, pictures: PictureSet) -> None:
    lines: list[str] = []
    config = AutoencoderConfig(minutes=0.04, batch=2, warmup_steps=1, ema_decay=0.9)
    before = measure(tiny_autoencoder(), torch.from_numpy(np.array(pictures.rgba)))
    model = train_autoencoder(pictures, tmp_path, config, model=tiny_autoencoder(), log=lines.append)
    after = measure(model, torch.from_numpy(np.array(pictures.rgba)))
    assert after["full"] > before["full"]
    first = json.loads((tmp_path / "state" / "progress.json").read_text())["step"]
    assert first > 0

    latents = model.encode(flatten_pictures(torch.from_numpy(np.array(pictures.rgba[:2])), None, 128)).detach()
    assert latents.shape == (2, 8, 16, 16)
    assert 0.2 < float(latents.std()) < 3
    reloaded = EmbeddedAutoencoder.from_pretrained(tmp_path / "model")
    assert reloaded.config.latents_std == model.config.latents_std
    picture = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(reloaded.encode(picture), model.encode(picture), atol=1e-4, rtol=1e-4)

    longer = AutoencoderConfig(minutes=0.06, batch=2, warmup_steps=1, ema_decay=0.9)
    train_autoencoder(pictures, tmp_path, longer, model=tiny_autoencoder(), log=lines.append)
    assert any(f"resuming at step {first}" in line for line in lines)
    assert json.loads((tmp_path / "state" / "progress.json").read_text())["step"] > first


def test_upsampling_twice_keeps_constants() -> None:
    assert torch.equal(upsample_twice(torch.full((1, 8, 4, 4), 3.0)), torch.full((1, 8, 8, 8), 3.0))
