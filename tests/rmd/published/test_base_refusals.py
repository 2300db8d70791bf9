"""Bases, folders and configurations that cannot be imported from: each is named, with the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rmd.backbones.base import BackboneError
from rmd.backbones.folder import DiffusersFolder
from rmd.checkpoint import CheckpointFolder
from rmd.published.files import ImportRefused
from rmd.published.gathering import ImportRequest
from rmd.published.importing import import_model
from rmd.published.source import licence_of
from tests.rmd.published.conftest import TinyFolder, save, weights

Import = Callable[..., Any]


def test_bases_that_are_none(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--base .*nowhere does not exist"):
        imported("sdxl", base=str(tmp_path / "nowhere"))
    with pytest.raises(ImportRefused, match=r"--base .*unet has no model_index\.json.*; give .*sdxl, whose component"):
        imported("sdxl", base=str(base("sdxl") / "unet"))
    with pytest.raises(BackboneError, match="lacks the component 'unet'"):
        imported("sdxl", base=str(base("pixart")))
    with pytest.raises(ValueError, match="--backbone pixart: preset 'sdxl-turbo' is for sdxl"):
        imported("pixart", preset="sdxl-turbo")
    with pytest.raises(ValueError, match="unknown preset 'nothing'"):
        imported("sdxl", preset="nothing")
    velocity = tmp_path / "velocity"
    shutil.copytree(base("sdxl"), velocity)
    scheduler = velocity / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    with pytest.raises(ImportRefused, match=r"preset 'sdxl-turbo' does not fit .*v_prediction"):
        imported("sdxl", base=str(velocity))
    pickled = tmp_path / "pickled"
    shutil.copytree(base("sdxl"), pickled)
    (pickled / "vae" / "diffusion_pytorch_model.safetensors").rename(pickled / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ImportRefused, match=r"diffusion_pytorch_model\.bin is a pickled file"):
        imported("sdxl", base=str(pickled))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, r"broken/tokenizer_2 has no vocabulary"),
        ("tokenizer.json", "{", r"no tokenizer could be read from .*broken/tokenizer_2"),
    ],
)
def test_a_base_without_a_vocabulary_is_refused_before_any_weight_is_read(
    base: TinyFolder, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    """The merge of a real base takes minutes; its files' digests alone do."""
    folder = Path(shutil.copytree(base("sdxl"), tmp_path / "broken"))
    for file in (folder / "tokenizer_2").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    if content is not None:
        (folder / "tokenizer_2" / name).write_text(content)
    told: list[str] = []
    request = ImportRequest(base=str(folder), preset="sdxl-turbo", out=tmp_path / "out")
    with pytest.raises(BackboneError, match=message):
        import_model(request, progress=lambda what, _done, _total: told.append(what))
    assert told == []
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(BackboneError, match="lacks the component 'tokenizer_2'"):
        import_model(request)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_student_that_gives_x0_is_recognised_by_its_scheduler(imported: Import) -> None:
    done = imported("sdxl", preset="sdxl-lightning-1")
    assert DiffusersFolder.open(done.folder).config("scheduler")["prediction_type"] == "sample"
    assert CheckpointFolder.read(done.folder).default_cascade.num_steps == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train_timesteps": 500}, "500 timesteps, not 1000"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "scales its network otherwise"),
    ],
)
def test_schedulers_that_mean_another_network(
    base: TinyFolder, imported: Import, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    other = Path(shutil.copytree(base("sdxl"), tmp_path / "other"))
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(BackboneError, match=message):
        imported("sdxl", base=str(other))


def test_pixart_sigma_is_another_model(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    sigma = Path(shutil.copytree(base("pixart"), tmp_path / "sigma"))
    index = json.loads((sigma / "model_index.json").read_text())
    (sigma / "model_index.json").write_text(json.dumps({**index, "_class_name": "PixArtSigmaPipeline"}))
    with pytest.raises(ImportRefused, match="names PixArt-Sigma"):
        imported("pixart", base=str(sigma), preset="pixart-lcm")


def test_a_students_folder_of_the_older_class_is_taken(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    student = Path(shutil.copytree(base("pixart") / "transformer", tmp_path / "student"))
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    done = imported("pixart", network=student)
    assert json.loads((done.folder / "transformer" / "config.json").read_text())["_class_name"] == (
        "PixArtTransformer2DModel"
    )


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: openrail++", "openrail++"),
        ("license: other\nlicense_name: stabilityai-ai-community", "stabilityai-ai-community"),
        ("license:\n- apache-2.0\n- mit", "apache-2.0"),
        ("license:\nlanguage:\n- en", None),
        ("license: \ntags:\n- lora", None),
    ],
)
def test_a_cards_licence_is_its_own_field_and_never_the_next_one(
    tmp_path: Path, front: str, licence: str | None
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    assert licence_of(folder=tmp_path) == licence


def test_a_base_with_a_damaged_decoder_is_refused_before_the_merge(
    base: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(base("sdxl"), tmp_path / "damaged"))
    (file,) = (folder / "vae").glob("*.safetensors")
    state = weights(folder / "vae")
    name = next(name for name in state if name.startswith("decoder.") and name.endswith(".weight"))
    for changed, error, message in (
        ({key: value for key, value in state.items() if key != name}, BackboneError, "damaged/vae lacks 1 weights of"),
        ({**state, "decoder.more.weight": torch.ones(2)}, BackboneError, "damaged/vae holds 1 weights that"),
        ({**state, name: torch.full_like(state[name], torch.nan)}, ImportRefused, "holds values that are not finite"),
    ):
        save(file, changed, {"format": "pt"})
        told: list[str] = []
        request = ImportRequest(base=str(folder), preset="sdxl-turbo", out=tmp_path / "out")
        with pytest.raises(error, match=message):
            import_model(request, progress=lambda what, _done, _total, told=told: told.append(what))
        assert "unet" not in told


def test_a_base_without_any_student_is_said_and_credited_to_none(
    base: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    """A forgotten --lora: noise-like pictures, ready and without a word."""
    told: list[str] = []
    done = imported("sdxl", preset="lcm-sdxl", say=told.append)
    (said,) = told
    assert said.startswith("nothing is merged: ") and "latent-consistency/lcm-lora-sdxl" in said and "--lora" in said
    assert "student" not in done.record["imported"]
    assert "latent-consistency" not in (tmp_path / "out" / "README.md").read_text()
    told.clear()
    assert "student" in imported("sdxl", preset="sdxl-turbo", say=told.append).record["imported"]
    assert not told, "published as a whole folder, which a base may be"
    imported("wan-1.3b", preset="rmd-wan", say=told.append)
    assert len(told) == 1 and "student_model-N" in told[0], "no base: a network that its trainer writes"


def test_a_configuration_that_builds_no_network_is_named(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base("sdxl"), folder)
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_act": "gelu_nope"}))
    with pytest.raises(
        ImportRefused, match=r"text_encoder/config\.json builds no CLIPTextModel \(KeyError: 'gelu_nope'\)"
    ):
        imported("sdxl", base=str(folder))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"layers_per_block": None}, r"broken/unet/config\.json, field 'layers_per_block': must be .*, not null"),
        ({"block_out_channels": "x"}, r"broken/unet/config\.json, field 'block_out_channels': must be a list, .* 'x'"),
        ({"mid_block_type": "x"}, r"broken/unet/config\.json, with .* describes no UNet2DConditionModel \("),
    ],
)
def test_a_denoisers_configuration_that_builds_none_is_named(
    base: TinyFolder, imported: Import, tmp_path: Path, field: dict[str, Any], message: str
) -> None:
    """They ended in a traceback, or in a sentence of diffusers' that names no file."""
    broken = Path(shutil.copytree(base("sdxl"), tmp_path / "broken"))
    config = broken / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | field))
    with pytest.raises((ImportRefused, BackboneError), match=message):
        imported("sdxl", base=str(broken))


def test_another_components_folder_as_network_is_named(base: TinyFolder, imported: Import) -> None:
    with pytest.raises(ImportRefused, match=r"text_encoder/config\.json, .* give the folder of the denoiser as --net"):
        imported("sdxl", network=base("sdxl") / "text_encoder")


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        (
            "wan-1.3b",
            "sd3",
            r"'wan' does not fit .*sd3: it needs a WanTransformer3DModel .*SD3Transformer2DModel",
        ),
        ("sd3", "wan-1.3b", r"'sd3' does not fit .*: it needs a SD3Transformer2DModel .*WanTransformer3DModel"),
        (
            "pixart",
            "sd3",
            r"'pixart' does not fit .*: it needs a PixArtTransformer2DModel .*SD3Transformer2DModel",
        ),
    ],
)
def test_a_base_of_another_family_is_named_and_none_of_its_fields(
    base: TinyFolder, imported: Import, name: str, other: str, message: str
) -> None:
    """Its patch_size was said to be wrong, and the way out to copy the file again."""
    with pytest.raises(ValueError, match=message):
        imported(name, base=str(base(other)))
