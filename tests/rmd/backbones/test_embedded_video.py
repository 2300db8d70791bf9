"""The film model: a picture model's network over all frames at once."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from rmd.backbones.base import BackboneError
from rmd.backbones.film_transformer import FilmTransformer
from rmd.backbones.tiny import tiny_cascades, tiny_config
from rmd.sampler import sample
from rmd.size import Size

CONFIG = {name: value for name, value in tiny_config("embedded")["transformer"].items() if not name.startswith("_")}
WIDTH = CONFIG["joint_attention_dim"]


@pytest.fixture(scope="module")
def pictures() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(**CONFIG).eval()


@pytest.fixture(scope="module")
def films(pictures: SD3Transformer2DModel) -> FilmTransformer:
    return FilmTransformer.from_pictures(pictures, max_frames=6).eval()


def inputs(frames: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 8, frames, 6, 4, generator=g),
        "timestep": torch.tensor([300.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 24, WIDTH, generator=g),
        "pooled_projections": torch.randn(2, WIDTH, generator=g),
    }


@torch.no_grad()
def test_a_film_of_one_frame_is_the_picture_to_the_bit(pictures: SD3Transformer2DModel, films: FilmTransformer) -> None:
    given = inputs(1)
    film = films(**given).sample
    picture = pictures(**{**given, "hidden_states": given["hidden_states"][:, :, 0]}).sample
    assert torch.equal(film[:, :, 0], picture)


@torch.no_grad()
def test_frames_see_each_other_and_know_their_place(films: FilmTransformer) -> None:
    given = inputs(3)
    before = films(**given).sample
    changed = given["hidden_states"].clone()
    changed[:, :, 2] += 1
    assert (films(**{**given, "hidden_states": changed}).sample[:, :, 0] - before[:, :, 0]).abs().max() > 1e-4
    backwards = films(**{**given, "hidden_states": given["hidden_states"].flip(2)}).sample.flip(2)
    assert (backwards - before).abs().max() > 1e-4
    # With its own numbers a frame stays what it was, wherever it stands.
    numbers = torch.tensor([2, 1, 0])
    turned = films(**{**given, "hidden_states": given["hidden_states"].flip(2)}, frame_numbers=numbers).sample.flip(2)
    torch.testing.assert_close(turned, before, atol=1e-5, rtol=1e-4)


def test_more_frames_than_the_table_has_are_refused(films: FilmTransformer) -> None:
    with pytest.raises(ValueError, match="7 frames are more than the 6"):
        films(**inputs(7))


def test_only_the_picture_models_own_shape_is_taken_over(pictures: SD3Transformer2DModel) -> None:
    other = SD3Transformer2DModel(**{**CONFIG, "qk_norm": "rms_norm"})
    other.register_to_config(qk_norm=None)
    with pytest.raises(ValueError, match="does not fit"):
        FilmTransformer.from_pictures(other)


def test_the_default_cascade_is_wans_at_96_and_144_pixels(tiny_backbone) -> None:
    cascade = tiny_backbone("embedded-video").default_cascade()
    assert cascade.schedule_name == "3+3"
    assert [step.timestep for step in cascade.steps] == [1000, 974, 937, 834, 716, 505]
    assert [step.size for step in cascade.steps] == [Size(96, 96, 9)] * 3 + [Size(144, 144, 9)] * 3


def test_films_decode_frame_by_frame(tiny_backbone) -> None:
    backbone, size = tiny_backbone("embedded-video"), Size(48, 32, 3)
    latents = torch.randn(2, *backbone.latent_shape(size))
    assert latents.shape == (2, 8, 3, 4, 6)
    film = backbone.decode(latents, size)
    assert film.shape == (2, 3, 3, 32, 48)
    for t in range(3):
        alone = backbone.decode(latents[:, :, t : t + 1], Size(48, 32, 1))
        torch.testing.assert_close(alone[:, :, 0], film[:, :, t], atol=1e-5, rtol=1e-4)


def test_a_prompt_becomes_a_film(tiny_backbone) -> None:
    backbone, cascade = tiny_backbone("embedded-video"), tiny_cascades("embedded-video")["3+3"]
    assert backbone.tokens_per_stage(cascade) == (20, 45)
    latents = sample(backbone, cascade, backbone.encode_prompts(["a", "b"]), [1, 2])
    film = backbone.decode(latents, cascade.full_size)
    assert film.shape == (2, 3, 5, 48, 48) and torch.isfinite(film).all()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (Size(40, 48, 5), "multiples of 16"),
        (Size(48, 48, 18), "at most 17 frames"),
        (Size(512, 512, 5), "at most 256 pixels"),
    ],
)
def test_impossible_sizes(tiny_backbone, size: Size, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        tiny_backbone("embedded-video").validate_size(size)
