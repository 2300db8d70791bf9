"""What holds for every backbone: loading errors, random weights, shapes, gradients, guidance, the registry."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmd.backbones.base import BackboneError
from rmd.backbones.executor import EagerExecutor
from rmd.backbones.folder import DiffusersFolder
from rmd.backbones.registry import BACKBONES, get_backbone, load_checkpoint
from rmd.backbones.tiny import TINY_BACKBONES, tiny_config, tiny_sizes, write_tiny_folder
from rmd.size import Size

NAMES = tuple(name for name in TINY_BACKBONES if name != "wan-14b")  # one class with the other


@pytest.fixture
def folder(tiny_folder, tmp_path: Path) -> Path:
    """A PixArt folder that a test may break."""
    copy = tmp_path / "pixart"
    shutil.copytree(tiny_folder("pixart"), copy)
    return copy


def _load(folder: Path | str) -> object:
    return get_backbone("pixart").load(folder, dtype=torch.float32)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_unknown_backbone_lists_the_known() -> None:
    with pytest.raises(
        BackboneError, match=r"unknown backbone 'flux'; known are embedded, embedded-video, sdxl, pixart, sd3, wan-1.3b"
    ):
        get_backbone("flux")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="is not a folder; to fetch from the hub write hub:"):
        _load(tmp_path / "absent")


def test_not_a_diffusers_folder(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"is not a diffusers folder: it has no model_index.json"):
        _load(tmp_path)


def test_broken_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")
    with pytest.raises(BackboneError, match=r"model_index.json: line 1, column 2: not valid JSON"):
        _load(folder)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_component(folder: Path, component: str) -> None:
    shutil.rmtree(folder / component)
    with pytest.raises(BackboneError, match=f"lacks the component '{component}'"):
        _load(folder)


def test_component_missing_in_index(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index["vae"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BackboneError, match="lacks the component 'vae'"):
        _load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BackboneError, match=r"holds pickled weights \(diffusion_pytorch_model.bin\)"):
        _load(folder)
    weights.with_suffix(".bin").unlink()
    with pytest.raises(BackboneError, match=r"the component 'transformer' has no \*.safetensors weights"):
        _load(folder)


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_a_weight_that_is_not_there_is_not_drawn_at_random(folder: Path, component: str) -> None:
    (weights,) = (folder / component).glob("*.safetensors")
    tensors = load_file(weights)
    del tensors[sorted(tensors)[-1]]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=rf"{component} lacks [12] weights of \w+, such as '[\w.]+': copy it again"):
        _load(folder)


def test_wrong_weights(folder: Path) -> None:
    shutil.copy(folder / "vae" / "config.json", folder / "transformer" / "config.json")
    with pytest.raises(BackboneError, match="transformer could not be loaded as PixArtTransformer2DModel"):
        _load(folder)


def test_half_variant_is_found(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    _load(folder)
    shutil.copy(weights.with_name("diffusion_pytorch_model.fp16.safetensors"), weights.with_name("m.ema.safetensors"))
    with pytest.raises(BackboneError, match=r"several weight variants \(ema, fp16\)"):
        _load(folder)


def test_v_prediction_folder_is_refused(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    with pytest.raises(BackboneError, match="pixart predicts noise; the scheduler says 'v_prediction'"):
        _load(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_tokenizer_with_code_is_refused(folder: Path, name: str) -> None:
    path = folder / "tokenizer" / name
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": ["evil.py", None]}}))
    with pytest.raises(BackboneError, match="code from a folder is never run"):
        _load(folder)


def test_broken_tokenizer_settings_are_named(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 77,\n "auto_map"}')
    with pytest.raises(BackboneError, match=r"tokenizer_config.json: line 2, column 12: not valid JSON"):
        _load(folder)


def test_only_what_a_backbone_needs_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    weights = ("model.safetensors", "model.fp16.safetensors")
    there = [f"unet/{name}" for name in ("config.json", *weights, "model.bin")]
    there += ["model_index.json", "vae/config.json", "vae/model.fp16.safetensors", "tokenizer/merges.txt"]
    there += ["all-in-one.safetensors", *(f"refiner/{name}" for name in weights)]
    parts = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]
    parts += ["model.safetensors.index.fp16.json"]
    there += [f"unet/{name}" for name in parts]
    alone = {f"text_encoder/{name}" for name in ("config.json", *parts)}
    there += alone

    def download(repository: str, revision: str | None, **patterns: Any) -> str:
        for name in filter_repo_objects(there, **patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert DiffusersFolder.open("hub:owner/name", ("unet", "vae", "text_encoder", "tokenizer")).path == tmp_path
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == {
        "model_index.json", "unet/config.json", "unet/model.safetensors",
        "vae/config.json", "vae/model.fp16.safetensors", "tokenizer/merges.txt", *alone,
    }  # fmt: skip


def test_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=r"nobody/nothing could not be fetched from the hub .* pass its folder"):
        _load("hub:nobody/nothing")
    with pytest.raises(BackboneError, match="is not hub:<owner>/<name>"):
        _load("hub:nothing")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("sdxl", Size(48, 64), "multiples of 32"),
        ("pixart", Size(64, 72), "multiples of 16"),
        ("sd3", Size(8, 64), "too small"),
        ("sdxl", Size(64, 64, 5), "makes single pictures"),
    ],
)
def test_impossible_sizes(tiny_backbone, name: str, size: Size, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        tiny_backbone(name).latent_shape(size)


def test_wrong_inputs(tiny_backbone) -> None:
    backbone, size = tiny_backbone("pixart"), Size(32, 32)
    x, t = torch.zeros(2, 4, 4, 4), torch.full((2,), 0.5)
    with pytest.raises(ValueError, match=r"latents of shape \(2, 4, 4, 4\) are not pixart at 64x64"):
        backbone.predict_x0(x, t, backbone.random_conditioning(2), Size(64, 64))
    with pytest.raises(ValueError, match="condition 'encoder_hidden_states' has 3 rows for 2 latents"):
        backbone.predict_x0(x, t, backbone.random_conditioning(3), size)
    with pytest.raises(BackboneError, match="no component 'encoder'"):
        backbone.example_inputs("encoder", size, 1)
    with pytest.raises(BackboneError, match="needs a size"):
        backbone.example_inputs("decoder", None, 1)
    with pytest.raises(KeyError, match="no component"):
        EagerExecutor({}).run("denoiser", size, {})


# ---- every family ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_from_config_has_every_shape(tiny_backbone, name: str) -> None:
    """Random weights in place: the loaded network's names and shapes, finite values, and every component runs."""
    backbone = get_backbone(name).from_config(tiny_config(name), torch.float32)
    loaded = tiny_backbone(name).component_modules()
    for component, module in backbone.component_modules().items():
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        assert shapes == {key: tuple(value.shape) for key, value in loaded[component].state_dict().items()}
        size = None if component.startswith("text_encoder") else tiny_sizes(name)[0]
        inputs = backbone.example_inputs(component, size, 2)
        output = backbone.run(component, size, inputs)
        assert torch.isfinite(output).all() and output.shape[0] == 2
        if component == "denoiser":
            assert output.shape == inputs["latents"].shape
    with pytest.raises(BackboneError, match="has no 'tokenizer'; load it from a folder"):
        backbone.encode_prompts(["a fox"])


@pytest.mark.parametrize("name", NAMES)
def test_random_buffers_are_real(tiny_backbone, name: str) -> None:
    """Position tables and rotary frequencies of a network with random weights are the real ones."""
    built = get_backbone(name).from_config(tiny_config(name), torch.float32).component_modules()["denoiser"]
    real = dict(tiny_backbone(name).component_modules()["denoiser"].named_buffers())
    for key, value in built.named_buffers():
        torch.testing.assert_close(value, real[key])


def test_from_config_ties_and_norms() -> None:
    modules = get_backbone("pixart").from_config(tiny_config("pixart"), torch.bfloat16).component_modules()
    text = modules["text_encoder"].model
    assert text.shared.weight is text.encoder.embed_tokens.weight
    assert text.encoder.final_layer_norm.weight.dtype == torch.bfloat16
    assert bool((text.encoder.final_layer_norm.weight == 1).all())
    decoder = modules["decoder"].vae.decoder
    assert not decoder.conv_in.bias.any() and bool((decoder.conv_norm_out.weight == 1).all())
    assert 0.015 < float(decoder.conv_in.weight.detach().float().std()) < 0.025


def test_from_config_without_text(tiny_backbone) -> None:
    config = {key: value for key, value in tiny_config("sdxl").items() if not key.startswith("text_encoder")}
    backbone = get_backbone("sdxl").from_config(config, torch.float32)
    assert set(backbone.component_modules()) == {"denoiser", "decoder"}
    size = Size(32, 32)
    x0 = backbone.predict_x0(torch.randn(2, 4, 4, 4), torch.full((2,), 0.5), backbone.random_conditioning(2), size)
    assert backbone.decode(x0, size).shape == (2, 3, 32, 32)
    with pytest.raises(BackboneError, match="the configuration lacks 'unet'"):
        get_backbone("sdxl").from_config({"scheduler": config["scheduler"]})


def test_load_without_weights(tiny_folder, tiny_backbone) -> None:
    """Tokenizers, shapes and schedule with no weights; another executor does the work."""
    backbone, checkpoint = load_checkpoint(tiny_folder("sd3"), dtype=torch.float32, weights=False)
    assert checkpoint.backbone_name == "sd3" and checkpoint.default == "2+2"
    assert {p.device.type for p in backbone.component_modules()["denoiser"].parameters()} == {"meta"}
    assert backbone.device.type == "cpu"
    whole = tiny_backbone("sd3")
    backbone.executor = whole.executor
    given, expected = backbone.encode_prompts(["a fox"]), whole.encode_prompts(["a fox"])
    for name, value in expected.items():
        assert torch.equal(given[name], value)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_in_bfloat16_is_called_in_bfloat16(tiny_folder, name: str) -> None:
    """As training does; some families keep single weights in float32."""
    backbone = get_backbone(name).load(tiny_folder(name), dtype=torch.bfloat16)
    size, denoiser = tiny_sizes(name)[0], backbone.component_modules()["denoiser"]
    latents = torch.randn(1, *backbone.latent_shape(size))
    t = torch.full((1,), 0.5, dtype=torch.float64)
    x0 = backbone.predict_x0(latents, t, backbone.random_conditioning(1), size, denoiser)
    assert x0.dtype == torch.float32 and bool(torch.isfinite(x0).all())


@pytest.mark.parametrize(
    ("device", "message"), [("foo", "unknown device"), ("cuda", "sees no CUDA device; use --device cpu")]
)
def test_a_device_that_is_not_there_is_named(
    tiny_folder, monkeypatch: pytest.MonkeyPatch, device: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as it is on most machines
    with pytest.raises(BackboneError, match=message):
        get_backbone("sd3").load(tiny_folder("sd3"), device=device)


def test_gradients_flow_through_a_given_denoiser(tiny_backbone) -> None:
    backbone, size = tiny_backbone("sd3"), Size(32, 32)
    denoiser = backbone.component_modules()["denoiser"]
    conditioning = backbone.encode_prompts(["a fox"])
    x0 = backbone.predict_x0(torch.randn(1, 16, 4, 4), torch.tensor([0.7]), conditioning, size, denoiser=denoiser)
    x0.square().mean().backward()
    gradients = [p.grad for p in denoiser.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)
    denoiser.zero_grad(set_to_none=True)
    plain = backbone.predict_x0(torch.randn(1, 16, 4, 4), torch.tensor([0.7]), conditioning, size)
    assert not plain.requires_grad and not plain.is_inference()


def test_guidance_is_the_formula_and_items_do_not_mix(tiny_backbone) -> None:
    backbone, size = tiny_backbone("sdxl"), Size(32, 32)
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([0.9, 0.3])
    conditioning, uncond = backbone.encode_prompts(["a fox", "a ship"]), backbone.encode_prompts([""])
    guided = backbone.guided_x0(x, t, conditioning, uncond, 4.0, size)
    both = {name: value.expand(2, *value.shape[1:]) for name, value in uncond.items()}
    given, without = backbone.predict_x0(x, t, conditioning, size), backbone.predict_x0(x, t, both, size)
    torch.testing.assert_close(guided, without + 4.0 * (given - without), rtol=1e-4, atol=1e-4)
    assert torch.equal(backbone.guided_x0(x, t, conditioning, uncond, 1.0, size), given)
    second = {name: value[1:] for name, value in conditioning.items()}
    torch.testing.assert_close(given[1:], backbone.predict_x0(x[1:], t[1:], second, size), rtol=1e-4, atol=1e-4)


def test_float16_keeps_the_overflowing_autoencoder_out(tiny_folder) -> None:
    backbone = get_backbone("sdxl").load(tiny_folder("sdxl"), dtype=torch.float16)
    assert backbone.decoder_dtype == torch.bfloat16
    assert next(backbone.component_modules()["denoiser"].parameters()).dtype == torch.float16
    assert backbone.example_inputs("decoder", Size(32, 32), 1)["latents"].dtype == torch.bfloat16


def test_long_prompts_are_cut_to_the_fixed_length(tiny_backbone) -> None:
    short, long = (tiny_backbone("sdxl").encode_prompts([text]) for text in ("fox", "fox " * 200))
    assert {k: v.shape for k, v in short.items()} == {k: v.shape for k, v in long.items()}
    with pytest.raises(ValueError, match="no prompts"):
        tiny_backbone("sdxl").encode_prompts([])


def test_tiny_folders_are_reproducible(tiny_folder, tmp_path: Path) -> None:
    again = write_tiny_folder("pixart", tmp_path / "again")
    other = write_tiny_folder("pixart", tmp_path / "other", seed=1)
    for path in sorted(tiny_folder("pixart").rglob("*.safetensors")):
        relative = path.relative_to(tiny_folder("pixart"))
        assert path.read_bytes() == (again / relative).read_bytes() != (other / relative).read_bytes()


def test_listing_names_imports_no_network() -> None:
    code = (
        "import sys; from rmd.backbones.registry import BACKBONES; list(BACKBONES); print('diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert len(BACKBONES) == 7


@pytest.mark.parametrize(("name", "last"), [("sdxl", 999.0), ("sd3", 1000.0)])
def test_a_table_network_never_sees_a_time_beyond_its_table(tiny_backbone, name: str, last: float) -> None:
    seen = tiny_backbone(name).network_timestep(torch.tensor([0.5, 1.0]))
    assert seen.tolist() == [500.0, last]
