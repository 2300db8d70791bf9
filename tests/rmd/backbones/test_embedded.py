"""The embedded adapter against the networks it wraps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from rmd.backbones.autoencoder import EmbeddedAutoencoder
from rmd.backbones.base import BackboneError
from rmd.backbones.embedded import EmbeddedBackbone
from rmd.sampler import sample
from rmd.size import Size

LOW, FULL = Size.square(128), Size.square(256)
TRANSFORMER: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 16,
}
MEAN, STD = [0.1 * i for i in range(8)], [1.0 + 0.2 * i for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete folder of small networks of the real classes."""
    path = tmp_path_factory.mktemp("embedded")
    torch.manual_seed(0)
    SD3Transformer2DModel(**TRANSFORMER).save_pretrained(path / "transformer")
    EmbeddedAutoencoder(widths=(8, 8), blocks=(1, 1), latents_mean=MEAN, latents_std=STD).save_pretrained(path / "vae")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle", ","]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(path / "tokenizer")
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained(path / "text_encoder")
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text('{"shift": 1.0}')
    index = {
        "_class_name": "EmbeddedBackbone",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["rmd.backbones.autoencoder", "EmbeddedAutoencoder"],
        "text_encoder": ["transformers", "BertModel"],
        "tokenizer": ["transformers", "BertTokenizerFast"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="module")
def backbone(folder: Path) -> EmbeddedBackbone:
    return EmbeddedBackbone.load(folder, dtype=torch.float32)


@pytest.mark.parametrize(("size", "side"), [(LOW, 16), (FULL, 32)])
def test_x0_is_the_flow_formula_on_the_transformers_velocity(
    folder: Path, backbone: EmbeddedBackbone, size: Size, side: int
) -> None:
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer").eval()
    conditioning = backbone.encode_prompts(["red circle", "circle"])
    latents, t = torch.randn(2, 8, side, side), torch.tensor([0.9, 0.25])
    with torch.no_grad():
        velocity = transformer(
            latents,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            pooled_projections=conditioning["pooled_projections"],
            timestep=1000 * t,
        ).sample
    expected = latents - t.view(2, 1, 1, 1) * velocity
    torch.testing.assert_close(backbone.predict_x0(latents, t, conditioning, size), expected, atol=1e-5, rtol=1e-4)

    uncond = backbone.encode_unconditional(2)
    without = backbone.predict_x0(latents, t, uncond, size)
    guided = backbone.guided_x0(latents, t, conditioning, uncond, 3.0, size)
    torch.testing.assert_close(guided, without + 3.0 * (expected - without), atol=1e-4, rtol=1e-3)


def test_gradients_reach_a_denoiser_that_is_passed(backbone: EmbeddedBackbone) -> None:
    denoiser: nn.Module = backbone.component_modules()["denoiser"]
    conditioning = backbone.random_conditioning(1)
    backbone.predict_x0(torch.randn(1, 8, 16, 16), torch.tensor([0.5]), conditioning, LOW, denoiser).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in denoiser.parameters() if p.requires_grad)
    denoiser.zero_grad(set_to_none=True)


def test_text_is_zero_at_padding_and_pooled_over_the_rest(backbone: EmbeddedBackbone) -> None:
    conditioning = backbone.encode_prompts(["red circle", "red"])
    states, pooled = conditioning["encoder_hidden_states"], conditioning["pooled_projections"]
    assert states.shape == (2, 24, 24)
    for row, length in ((0, 4), (1, 3)):  # with the begin and the end mark
        assert (states[row, :length].abs().sum(-1) > 0).all()
        assert (states[row, length:] == 0).all()
        torch.testing.assert_close(pooled[row], states[row, :length].mean(0), atol=1e-5, rtol=1e-4)
    alone = backbone.encode_prompts(["red"])
    torch.testing.assert_close(alone["encoder_hidden_states"][0], states[1], atol=1e-5, rtol=1e-4)
    empty = backbone.encode_unconditional(3)
    assert empty["encoder_hidden_states"].shape == (3, 24, 24)
    assert (empty["encoder_hidden_states"][:, 2:] == 0).all()


def test_a_long_prompt_is_cut_to_24_tokens(backbone: EmbeddedBackbone) -> None:
    states = backbone.encode_prompts(["red circle " * 40])["encoder_hidden_states"]
    assert states.shape == (1, 24, 24)
    assert (states.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("size", [LOW, FULL])
def test_decoding_undoes_the_latents_normalisation(folder: Path, backbone: EmbeddedBackbone, size: Size) -> None:
    autoencoder = EmbeddedAutoencoder.from_pretrained(folder / "vae").eval()
    pixels = torch.rand(2, 3, size.height, size.width) * 2 - 1
    with torch.no_grad():
        latents = autoencoder.encode(pixels)
        raw = autoencoder.encoder(pixels)
        expected = autoencoder.decoder(raw)
    mean, std = (torch.tensor(values).view(1, 8, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(latents, (raw - mean) / std)
    assert latents.shape[1:] == backbone.latent_shape(size)
    pictures = backbone.decode(latents, size)
    assert pictures.shape == (2, 3, size.height, size.width)
    torch.testing.assert_close(pictures, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-4)


def test_the_default_cascade_goes_from_128_to_256_pixels(backbone: EmbeddedBackbone) -> None:
    cascade = backbone.default_cascade()
    assert cascade.schedule_name == "2+2"
    assert [step.size for step in cascade.steps] == [LOW, LOW, FULL, FULL]
    assert backbone.tokens_per_stage(cascade) == (64, 256)
    latents = sample(backbone, cascade, backbone.encode_prompts(["red", "circle"]), [1, 2])
    assert latents.shape == (2, 8, 32, 32)
    assert torch.isfinite(latents).all()


def test_every_component_runs_on_its_example(backbone: EmbeddedBackbone) -> None:
    for name, module in backbone.component_modules().items():
        with torch.no_grad():
            output = module(**backbone.example_inputs(name, FULL, 2))
        assert output.shape[0] == 2


def test_sizes_that_do_not_fit_are_refused(backbone: EmbeddedBackbone) -> None:
    with pytest.raises(BackboneError, match="multiples of 16"):
        backbone.validate_size(Size(120, 128))
    with pytest.raises(BackboneError, match="at most 256"):
        backbone.validate_size(Size(512, 512))
    with pytest.raises(BackboneError, match="frames"):
        backbone.validate_size(Size(128, 128, 5))


def test_a_folder_without_its_transformer_is_named(folder: Path, tmp_path: Path) -> None:
    for part in folder.iterdir():
        if part.name != "transformer":
            (tmp_path / part.name).symlink_to(part)
    with pytest.raises(BackboneError, match="'transformer'"):
        EmbeddedBackbone.load(tmp_path)


def test_the_published_shape_of_the_denoiser() -> None:
    config = {
        "transformer": {
            **TRANSFORMER, "num_layers": 8, "attention_head_dim": 64, "num_attention_heads": 4,
            "joint_attention_dim": 384, "caption_projection_dim": 256, "pooled_projection_dim": 384,
        },
        "scheduler": {},
    }  # fmt: skip
    backbone = EmbeddedBackbone.from_config(config, device="meta")
    assert backbone.denoiser_parameters() == 18_624_032
    assert (backbone.teacher_steps, backbone.teacher_guidance) == (50, 3.0)
