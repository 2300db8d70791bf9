"""Small decoders: each family decodes as diffusers' own class does; what does not fit is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, AutoencoderTiny
from torch.nn import functional as F

from rmd.backbones.base import BackboneError
from rmd.backbones.decoders import small_decoder_config
from rmd.backbones.registry import get_backbone, load_checkpoint
from rmd.backbones.tiny import tiny_config, tiny_sizes, write_tiny_decoder
from rmd.cascade_file import write_cascade_json
from rmd.checkpoint import CheckpointFolder

IMAGES = ("sdxl", "pixart", "sd3", "embedded")


def shown(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.mul(0.5).add(0.5).clamp(0, 1)


def own_space(name: str) -> tuple[float, float]:
    """scaling_factor and shift_factor of the family's own published autoencoder."""
    vae = tiny_config(name)["vae"]
    return float(vae["scaling_factor"]), float(vae.get("shift_factor") or 0.0)


@pytest.mark.parametrize("name", IMAGES)
def test_latents_reach_a_decoder_of_the_taesd_kind_as_the_denoiser_leaves_them(
    tiny_folder, assert_same, tmp_path: Path, name: str
) -> None:
    decoder = write_tiny_decoder(name, tmp_path / "small")
    backbone, _ = load_checkpoint(tiny_folder(name), dtype=torch.float32, decoder=decoder)
    size = tiny_sizes(name)[1]
    latents = 2 * torch.randn(2, *backbone.latent_shape(size))
    with torch.no_grad():
        expected = AutoencoderTiny.from_pretrained(decoder).decode(latents).sample
    pictures = backbone.decode(latents, size)
    assert_same(pictures, shown(expected))
    assert pictures.shape == (2, 3, 64, 64)
    assert float(pictures.std()) > 1e-3


@pytest.mark.parametrize("name", ["sdxl", "pixart", "sd3"])
def test_a_decoder_of_raw_latents_is_scaled_as_diffusers_pipelines_do(
    tiny_folder, assert_same, tmp_path: Path, name: str
) -> None:
    scale, shift = own_space(name)
    decoder = write_tiny_decoder(name, tmp_path / "small", scaling_factor=scale, shift_factor=shift)
    backbone, _ = load_checkpoint(tiny_folder(name), dtype=torch.float32, decoder=decoder)
    size = tiny_sizes(name)[1]
    latents = torch.randn(1, *backbone.latent_shape(size))
    with torch.no_grad():
        expected = AutoencoderTiny.from_pretrained(decoder).decode(latents / scale + shift).sample
    assert_same(backbone.decode(latents, size), shown(expected))


def test_the_stable_diffusion_3_pipeline_draws_the_same_picture(tiny_folder, assert_same, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from rmd.cascade import Cascade
    from rmd.sampler import initial_noise, sample

    decoder, size = write_tiny_decoder("sd3", tmp_path / "small"), tiny_sizes("sd3")[1]
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_folder("sd3"), torch_dtype=torch.float32)
    pipeline.vae = AutoencoderTiny.from_pretrained(decoder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline.set_progress_bar_config(disable=True)
    backbone, _ = load_checkpoint(tiny_folder("sd3"), dtype=torch.float32, decoder=decoder)
    noise = initial_noise(backbone.latent_shape(size), [3])
    drawn = pipeline(
        "a red fox", latents=noise, output_type="latent", num_inference_steps=2, guidance_scale=1.0, width=64, height=64
    ).images
    expected = pipeline(
        "a red fox", latents=noise, output_type="pt", num_inference_steps=2, guidance_scale=1.0, width=64, height=64
    ).images
    assert_same(backbone.decode(drawn, size), expected)
    cascade = Cascade.from_steps("stock", [1000, 500], [size] * 2)
    assert sample(backbone, cascade, backbone.encode_prompts(["a red fox"]), [3]).shape == drawn.shape


def test_packed_pixels_are_unpacked(tiny_folder, assert_same, tmp_path: Path) -> None:
    config = small_decoder_config(8, 8, (1, 1), 8)
    assert config["out_channels"] == 48
    network = AutoencoderTiny(**config)
    network.save_pretrained(tmp_path / "packed")
    backbone, _ = load_checkpoint(tiny_folder("embedded"), dtype=torch.float32, decoder=tmp_path / "packed")
    latents = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        expected = F.pixel_shuffle(network.decode(latents).sample, 4)
    assert_same(backbone.decode(latents, tiny_sizes("embedded")[0]), shown(expected))


def test_films_of_the_embedded_kind_are_decoded_frame_by_frame(tiny_folder, assert_same, tmp_path: Path) -> None:
    decoder = write_tiny_decoder("embedded-video", tmp_path / "small")
    backbone, _ = load_checkpoint(tiny_folder("embedded-video"), dtype=torch.float32, decoder=decoder)
    size = tiny_sizes("embedded-video")[0]
    latents = torch.randn(2, *backbone.latent_shape(size))
    network = AutoencoderTiny.from_pretrained(decoder)
    with torch.no_grad():
        frames = [network.decode(latents[:, :, index]).sample for index in range(latents.shape[2])]
    assert_same(backbone.decode(latents, size), shown(torch.stack(frames, dim=2)))


def test_films_of_wan_take_a_narrower_autoencoder_of_its_class(tiny_folder, assert_same, tmp_path: Path) -> None:
    decoder = write_tiny_decoder("wan-1.3b", tmp_path / "small")
    backbone, _ = load_checkpoint(tiny_folder("wan-1.3b"), dtype=torch.float32, decoder=decoder)
    size = tiny_sizes("wan-1.3b")[0]
    latents = torch.randn(1, *backbone.latent_shape(size))
    network = AutoencoderKLWan.from_pretrained(decoder)
    mean, std = (torch.tensor(network.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        expected = network.decode(latents * std + mean).sample
    assert_same(backbone.decode(latents, size), shown(expected))


@pytest.mark.parametrize("name", [*IMAGES, "embedded-video", "wan-1.3b"])
def test_the_autoencoders_weights_are_left_alone(tiny_folder, tmp_path: Path, name: str) -> None:
    """What decodes is the small one, without weights of the other, on the meta device as well."""
    decoder = write_tiny_decoder(name, tmp_path / "small")
    full, _ = load_checkpoint(tiny_folder(name), dtype=torch.float32)
    small, _ = load_checkpoint(tiny_folder(name), dtype=torch.float32, decoder=decoder)
    bare, _ = load_checkpoint(tiny_folder(name), dtype=torch.float32, decoder=decoder, weights=False)
    counts = [sum(p.numel() for p in b.component_modules()["decoder"].parameters()) for b in (full, small, bare)]
    assert counts[0] != counts[1] == counts[2]
    assert {p.device.type for p in bare.component_modules()["decoder"].parameters()} == {"meta"}
    size = tiny_sizes(name)[0]
    assert small.example_inputs("decoder", size, 2)["latents"].shape == (2, *small.latent_shape(size))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("sdxl", {"latent_channels": 16}, "latent_channels is 16, expected 4"),
        ("sd3", {"latent_channels": 4}, "latent_channels is 4, expected 16"),
        ("sdxl", {"scaling_factor": 0.18215}, "0.18215 and 0, expected 1 and 0 or 0.13025 and 0"),
        ("pixart", {"scaling_factor": 0.13025}, "0.13025 and 0, expected 1 and 0 or 0.18215 and 0"),
        ("sd3", {"scaling_factor": 1.5305}, "1.5305 and 0, expected 1.5305 and 0.0609 or 1 and 0"),
        ("embedded", {"scaling_factor": 0.13025}, "0.13025 and 0, expected 1 and 0"),
        ("sdxl", {"upsampling_scaling_factor": 1}, "it draws 1 pixels a latent position along a side, expected 8"),
        ("sdxl", {"out_channels": 4}, "out_channels is 4, expected 3"),
        ("wan-1.3b", {"z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "z_dim is 4, expected 16"),
        ("wan-1.3b", {"latents_std": [1.0] * 16}, "latents_std is [1, ...], expected [2.8184, ...]"),
    ],
)
def test_a_decoder_that_does_not_fit_is_named_with_what_is_expected(
    tiny_folder, tmp_path: Path, name: str, changes: dict[str, object], said: str
) -> None:
    decoder = write_tiny_decoder(name, tmp_path / "small", **changes)
    with pytest.raises(BackboneError) as caught:
        load_checkpoint(tiny_folder(name), decoder=decoder)
    message = str(caught.value)
    assert str(decoder) in message and said in message, message
    assert "\n" not in message


def test_another_class_or_no_decoder_at_all(tiny_folder, tmp_path: Path) -> None:
    sdxl = tiny_folder("sdxl")
    with pytest.raises(BackboneError, match=r"is of class 'AutoencoderKL'; sdxl takes AutoencoderTiny of diffusers"):
        load_checkpoint(sdxl, decoder=sdxl / "vae")
    frames = write_tiny_decoder("sd3", tmp_path / "frames")
    with pytest.raises(BackboneError, match="wan-14b takes AutoencoderKLWan"):
        load_checkpoint(tiny_folder("wan-14b"), decoder=frames)
    with pytest.raises(FileNotFoundError, match="absent is not a folder; give one, or 'full'"):
        load_checkpoint(sdxl, decoder=tmp_path / "absent")
    (frames / "weights.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weights.bin is a pickled file"):
        load_checkpoint(tiny_folder("sd3"), decoder=frames)


def test_a_checkpoint_names_its_decoder_and_the_full_one_is_a_word_away(tiny_folder, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "student"
    shutil.copytree(tiny_folder("sdxl"), folder)
    write_tiny_decoder("sdxl", folder / "decoder")
    before = CheckpointFolder.read(folder)
    assert before.decoder_path is None
    write_cascade_json(
        folder, backbone="sdxl", cascades=before.cascades, default=before.default, teacher=before.teacher,
        decoder="decoder",
    )  # fmt: skip
    named = CheckpointFolder.read(folder)
    assert named.decoder_path == folder / "decoder"
    assert "decoder/diffusion_pytorch_model.safetensors" in json.loads((folder / "cascade.json").read_text())["weights"]
    # engines are keyed by the weights that they decode with
    assert named.digest("decoder") != before.digest("decoder") == named.with_decoder("full").digest("decoder")
    assert before.digest("vae") == named.digest("vae")
    small, _ = load_checkpoint(folder, dtype=torch.float32)
    full, _ = load_checkpoint(folder, dtype=torch.float32, decoder="full")
    original = get_backbone("sdxl").load(tiny_folder("sdxl"), dtype=torch.float32)
    size = tiny_sizes("sdxl")[0]
    latents = torch.randn(1, *full.latent_shape(size))
    assert torch.equal(full.decode(latents, size), original.decode(latents, size))
    assert not torch.allclose(small.decode(latents, size), full.decode(latents, size), atol=1e-2)
    # a named decoder that has gone is no reason not to use the full one
    shutil.rmtree(folder / "decoder")
    data = json.loads((folder / "cascade.json").read_text())
    (folder / "cascade.json").write_text(json.dumps({**data, "weights": {}}))
    with pytest.raises(BackboneError, match="decoder is not a folder"):
        load_checkpoint(folder)
    load_checkpoint(folder, decoder="full")


def test_a_distilled_decoder_is_refused_for_another_autoencoder(tiny_folder, tmp_path: Path) -> None:
    decoder = write_tiny_decoder("embedded", tmp_path / "small")
    digest = CheckpointFolder.read(tiny_folder("embedded")).digest("vae")
    (decoder / "decoder.json").write_text(json.dumps({"autoencoder": digest}))
    load_checkpoint(tiny_folder("embedded"), decoder=decoder)
    (decoder / "decoder.json").write_text(json.dumps({"autoencoder": "0" * 64}))
    with pytest.raises(BackboneError, match="distilled from another autoencoder"):
        load_checkpoint(tiny_folder("embedded"), decoder=decoder)
