"""The way back from pixels to latents, against the autoencoders' own calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rmd.backbones.base import BackboneError
from rmd.backbones.family import DiffusersBackbone
from rmd.backbones.registry import BACKBONES, get_backbone
from rmd.backbones.tiny import tiny_sizes, write_tiny_decoder


def pixels_for(backbone: DiffusersBackbone, seed: int = 0) -> Tensor:
    size = tiny_sizes(backbone.name)[0]
    frames = (size.num_frames,) if backbone.media == "video" else ()
    return torch.rand(2, 3, *frames, size.height, size.width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", BACKBONES)
def test_encoding_gives_the_denoisers_own_latents(tiny_backbone, name: str) -> None:
    backbone = tiny_backbone(name)
    pixels = pixels_for(backbone)
    latents = backbone.encode(pixels)
    assert latents.dtype == torch.float32
    assert tuple(latents.shape[1:]) == backbone.latent_shape(tiny_sizes(name)[0])
    assert not torch.allclose(latents, backbone.encode(1 - pixels), atol=1e-3)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "wan-1.3b"])
def test_latents_are_the_posteriors_scaled_as_diffusers_scales_them(tiny_backbone, assert_same, name: str) -> None:
    backbone = tiny_backbone(name)
    vae, pixels = backbone.component_modules()["decoder"].vae, pixels_for(backbone)
    with torch.no_grad():
        posterior = vae.encode(2 * pixels - 1).latent_dist
    # The sample that diffusers itself draws, from the same generator.
    sampled = posterior.sample(torch.Generator().manual_seed(5))
    noise = torch.randn(sampled.shape, generator=torch.Generator().manual_seed(5))
    config = vae.config
    for raw, latents in ((posterior.mode(), backbone.encode(pixels)), (sampled, backbone.encode(pixels, noise))):
        if name == "wan-1.3b":
            shape = (1, -1, 1, 1, 1)
            mean, std = (torch.tensor(value).view(shape) for value in (config.latents_mean, config.latents_std))
            assert_same(latents, (raw - mean) / std)
        else:
            assert_same(latents, (raw - (config.shift_factor or 0.0)) * config.scaling_factor)


def test_films_of_the_embedded_autoencoder_are_encoded_frame_by_frame(tiny_backbone, assert_same) -> None:
    backbone = tiny_backbone("embedded-video")
    pixels = pixels_for(backbone)
    vae = backbone.component_modules()["decoder"].vae
    with torch.no_grad():
        frames = [vae.encode(2 * pixels[:, :, t] - 1) for t in range(pixels.shape[2])]
    assert_same(backbone.encode(pixels), torch.stack(frames, 2))


def test_a_small_decoder_leaves_nothing_to_encode_with(tiny_folder, tmp_path: Path) -> None:
    decoder = write_tiny_decoder("sd3", tmp_path / "decoder")
    backbone = get_backbone("sd3").load(tiny_folder("sd3"), dtype=torch.float32, decoder=decoder)
    with pytest.raises(BackboneError, match="no autoencoder to encode with: load it without a small decoder"):
        backbone.encode(torch.zeros(1, 3, 64, 64))
