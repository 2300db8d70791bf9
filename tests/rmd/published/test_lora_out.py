"""LoRA out: stock readers draw with the file what the merged checkpoint draws, and an import gives it back."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import (
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
)
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner

from cli.main import app as main
from rmd.backbones.random_weights import resolve
from rmd.backbones.registry import get_backbone
from rmd.cascade_file import write_cascade_json
from rmd.checkpoint import CheckpointFolder, TeacherSpec
from rmd.published.exporting import ADAPTERS, export_adapters, export_difference, keep_adapters
from rmd.published.files import ImportRefused
from rmd.published.lora_pictures import picture_error
from rmd.weight_files import file_digest
from tests.rmd.published.conftest import TinyFolder, closed_to_others, save, weights
from training.distill.adapters import adapted_layers, learnt_adapters

PIPELINES = {
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
    "wan-1.3b": WanPipeline,
    "pixart": PixArtAlphaPipeline,
}
EVERY_GROUP = ["attention", "mlp", "convolutions", "projections"]
Student = Callable[..., CheckpointFolder]


def component_of(name: str) -> str:
    return "unet" if name == "sdxl" else "transformer"


def network_in(name: str, folder: Path) -> Any:
    target = get_backbone(name).components[component_of(name)]  # type: ignore[attr-defined]
    return resolve(target).from_pretrained(folder / component_of(name))


@pytest.fixture
def student(base: TinyFolder, tmp_path: Path) -> Student:
    """A checkpoint distilled from a tiny base: with adapters on some layers, or with all weights changed."""

    def make(name: str, targets: list[str] | None = None, scale: float = 0.1) -> CheckpointFolder:
        folder = Path(shutil.copytree(base(name), tmp_path / "student"))
        network = network_in(name, folder)
        torch.manual_seed(3)
        if targets is None:
            for parameter in network.parameters():
                parameter.data += scale * parameter.std() * torch.randn_like(parameter) if parameter.ndim else 0
            network.save_pretrained(folder / component_of(name))
        else:
            config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=adapted_layers(network, targets))
            adapted = peft.get_peft_model(network, config)
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    torch.nn.init.normal_(parameter, std=scale)
            adapters = learnt_adapters(adapted)
            adapted.merge_and_unload().save_pretrained(folder / component_of(name))
            keep_adapters(folder, name, adapters, base(name))
        former = CheckpointFolder.read(base(name))
        write_cascade_json(
            folder,
            backbone=name,
            cascades=former.cascades,
            default=former.default,
            teacher=TeacherSpec(2, 3.0, 1.0, folder=os.path.relpath(base(name), folder)),
            distillation={"method": "rmd"},
        )
        return CheckpointFolder.read(folder)

    return make


def draw(pipe: Any, name: str) -> Tensor:
    options: dict[str, Any] = {"height": 64, "width": 64, "output_type": "latent", "num_inference_steps": 2}
    if name == "wan-1.3b":
        options |= {"height": 48, "width": 48, "num_frames": 5}
    pipe.set_progress_bar_config(disable=True)
    output = pipe("a fox", guidance_scale=2.0, generator=torch.Generator().manual_seed(0), **options)
    latents: Tensor = output[0] if isinstance(output[0], Tensor) else torch.as_tensor(output[0])
    return latents


def assert_draws_alike(name: str, base: Path, merged: Path, load: Callable[[Any], Any]) -> None:
    """The stock pipeline on the base with the LoRA, and on the merged checkpoint."""
    kind = PIPELINES[name]
    expected = draw(kind.from_pretrained(merged), name)
    plain = kind.from_pretrained(base)
    before = draw(plain, name)
    after = draw(load(plain), name)
    assert float((before - expected).abs().max()) > 1e-2
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def with_lora(path: Path) -> Callable[[Any], Any]:
    def load(pipe: Any) -> Any:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        return pipe

    return load


def with_peft(path: Path) -> Callable[[Any], Any]:
    def load(pipe: Any) -> Any:
        pipe.transformer = peft.PeftModel.from_pretrained(pipe.transformer, path).merge_and_unload()
        return pipe

    return load


def given_back(imported: Any, name: str, file: Path, out: Path, merged: Path) -> None:
    imported(name, loras=((file, 1.0),), out=out)
    found, expected = weights(out / component_of(name)), weights(merged / component_of(name))
    assert found.keys() == expected.keys()
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) <= 1e-6


@pytest.mark.parametrize(
    ("name", "layout", "targets"),
    [
        ("sdxl", "diffusers", EVERY_GROUP),
        ("sdxl", "kohya", EVERY_GROUP),
        ("sd3", "diffusers", EVERY_GROUP),
        ("wan-1.3b", "diffusers", EVERY_GROUP),
        ("wan-1.3b", "kohya", ["attention", "mlp"]),  # diffusers' reader of kohya's Wan files knows no others
        ("pixart", "peft", EVERY_GROUP),
    ],
)
def test_stock_readers_draw_with_the_adapters_what_the_checkpoint_draws(
    student: Student, base: TinyFolder, imported: Any, tmp_path: Path, name: str, layout: Any, targets: list[str]
) -> None:
    checkpoint = student(name, targets)
    out = tmp_path / ("lora" if layout == "peft" else "lora.safetensors")
    export_adapters(checkpoint, out, layout)
    load = with_peft(out) if layout == "peft" else with_lora(out)
    assert_draws_alike(name, base(name), checkpoint.path, load)
    given_back(imported, name, out, tmp_path / "back", checkpoint.path)


@pytest.mark.parametrize(("name", "targets"), [("sd3", EVERY_GROUP), ("sd3", ["to_k"]), ("wan-1.3b", EVERY_GROUP)])
def test_kohyas_names_of_every_layer_are_given_back(
    student: Student, imported: Any, tmp_path: Path, name: str, targets: list[str]
) -> None:
    """No stock reader here takes them; `rmd import` is held against the first code's weights elsewhere."""
    checkpoint = student(name, targets)
    export_adapters(checkpoint, tmp_path / "lora.safetensors", "kohya")
    given_back(imported, name, tmp_path / "lora.safetensors", tmp_path / "back", checkpoint.path)


@pytest.mark.parametrize("name", ["sdxl", "pixart", "sd3", "wan-1.3b"])
def test_a_whole_difference_is_cut_with_the_stated_error(
    student: Student, base: TinyFolder, imported: Any, tmp_path: Path, name: str
) -> None:
    checkpoint = student(name)
    out = tmp_path / ("lora" if name == "pixart" else "lora.safetensors")
    done = export_difference(checkpoint, out, base(name), rank=5, dtype=torch.float32)
    before, after = weights(base(name) / component_of(name)), weights(checkpoint.path / component_of(name))
    imported(name, loras=((out, 1.0),), out=tmp_path / "back")
    back = weights(tmp_path / "back" / component_of(name))
    lost = whole = 0.0
    for key, value in before.items():
        change = (after[key] - value).double()
        missing = float((after[key] - back[key]).double().square().sum())
        lost, whole = lost + missing, whole + float(change.square().sum())
        layer = key.removesuffix(".weight")
        if layer not in done.modules:
            assert (key in done.left_out) == bool(change.any())
            continue
        values = torch.linalg.svdvals(change.flatten(1)).square()  # Eckart and Young: none does better
        assert done.errors[layer] == pytest.approx(math.sqrt(float(values[5:].sum() / values.sum())), abs=1e-4)
        assert math.sqrt(missing / float(values.sum())) == pytest.approx(done.errors[layer], abs=1e-4)
    assert done.error == pytest.approx(math.sqrt(lost / whole), abs=1e-4) and 0.3 < done.error < 1
    assert any(key.endswith(".bias") for key in done.left_out)


def test_the_rank_is_the_smallest_within_the_error(student: Student, base: TinyFolder, tmp_path: Path) -> None:
    checkpoint = student("sd3")
    out = tmp_path / "lora.safetensors"
    done = export_difference(checkpoint, out, base("sd3"), error=0.4, dtype=torch.float32)
    rank = next(iter(done.modules.values())).rank
    before, after = weights(base("sd3") / "transformer"), weights(checkpoint.path / "transformer")
    spectra = [
        torch.linalg.svdvals((after[f"{layer}.weight"] - before[f"{layer}.weight"]).double().flatten(1)).square()
        for layer in done.modules
    ]
    whole = sum(float(values.sum()) for values in spectra)
    lost = [math.sqrt(sum(float(values[cut:].sum()) for values in spectra) / whole) for cut in (rank - 1, rank)]
    assert lost[0] > 0.4 >= lost[1] and done.layers_error == pytest.approx(lost[1], abs=1e-4)
    with pytest.raises(ValueError, match="needs the full rank"):
        export_difference(checkpoint, out, base("sd3"), error=0.0)


def test_pictures_of_a_full_rank_lora_are_the_checkpoints_but_for_what_it_cannot_hold(
    student: Student, base: TinyFolder, tmp_path: Path
) -> None:
    checkpoint = student("sd3", EVERY_GROUP)
    errors = []
    for rank in (1, 3):  # the adapters' own rank is 3
        done = export_difference(checkpoint, tmp_path / "x.safetensors", base("sd3"), rank=rank, dtype=torch.float32)
        assert done.left_out == ()
        errors.append(picture_error(checkpoint, done, ["a fox"]))
    assert errors[1] < 1e-5 < 1e-3 < errors[0]


def test_a_text_encoder_that_differs_too_is_named(imported: Any, base: TinyFolder, tmp_path: Path) -> None:
    """It was left out without a word, and the pictures, drawn with it, were told to be the checkpoint's."""
    state = weights(base("sdxl") / "text_encoder")
    key = next(name for name in state if name.endswith("q_proj.weight"))
    rows, columns = state[key].shape
    unet = next(name for name in weights(base("sdxl") / "unet") if name.endswith("attn1.to_q.weight"))
    side = weights(base("sdxl") / "unet")[unet].shape[0]
    both: dict[str, Tensor] = {}
    for module, (out, into) in (
        (f"text_encoder.{key}", (rows, columns)),
        (f"unet.{unet}", (side, side)),
    ):
        both[module.replace(".weight", ".lora_A.weight")] = torch.ones(1, into)
        both[module.replace(".weight", ".lora_B.weight")] = torch.ones(out, 1)
    file = save(tmp_path / "both.safetensors", both)
    checkpoint = CheckpointFolder.read(imported("sdxl", loras=((file, 1.0),)).folder)
    out = tmp_path / "lora.safetensors"
    assert export_difference(checkpoint, out, base("sdxl"), rank=2).elsewhere == {"text_encoder": 1}
    run = ["export", "--checkpoint", str(checkpoint.path), "--base", str(base("sdxl")), "--lora", str(out)]
    shown = CliRunner().invoke(main, [*run, "--rank", "100", "--no-pictures"])
    assert shown.exit_code == 0 and "not in the LoRA: text_encoder, 1 of whose weights differ" in shown.output
    # Only rounded, it is the same one.
    file = save(tmp_path / "unet.safetensors", {name: value for name, value in both.items() if name.startswith("unet")})
    single = imported("sdxl", loras=((file, 1.0),), out=tmp_path / "rounded").folder
    (vae,) = (single / "vae").glob("*.safetensors")
    save(vae, {name: value.half() for name, value in weights(single / "vae").items()}, {"format": "pt"})
    write_cascade_json(single, backbone="sdxl", cascades=checkpoint.cascades, default=checkpoint.default)
    assert export_difference(CheckpointFolder.read(single), out, base("sdxl"), rank=2).elsewhere == {}


def test_the_header_says_where_it_comes_from(student: Student, base: TinyFolder, tmp_path: Path) -> None:
    checkpoint = student("sd3", ["attention"])
    (checkpoint.path / "README.md").write_text("---\nlicense: openrail++\n---\n", encoding="utf-8")
    export_adapters(checkpoint, tmp_path / "adapters.safetensors", "kohya", torch.float16)
    export_difference(checkpoint, tmp_path / "cut.safetensors", base("sd3"), rank=3)
    weight = "diffusion_pytorch_model.safetensors"
    for file in ("adapters.safetensors", "cut.safetensors"):
        with safe_open(tmp_path / file, framework="pt") as opened:
            header: Mapping[str, str] = opened.metadata()
            assert {opened.get_tensor(key).dtype for key in opened.keys() if "lora" in key.rpartition(".lora")[1]} == {  # noqa: SIM118
                torch.float16
            }
        assert header["rmd.schedule"] == "2+2" and header["rmd.method"] == "rmd" and header["rmd.base"] == "sd3"
        assert json.loads(header["rmd.base_sha256"]) == {weight: file_digest(base("sd3") / "transformer" / weight)}
        assert header["rmd.checkpoint_sha256"] == checkpoint.digest("denoiser")
        assert str(tmp_path) not in json.dumps(dict(header))
        assert header["modelspec.license"] == "openrail++"
    settings = json.loads(header["lora_adapter_metadata"])
    assert settings["transformer.r"] == settings["transformer.lora_alpha"] == 3


def test_what_does_not_fit_is_refused(student: Student, base: TinyFolder, tmp_path: Path) -> None:
    checkpoint = student("pixart", ["attention"])
    with pytest.raises(ValueError, match="PixArt pipelines read no LoRA; give --format peft"):
        export_adapters(checkpoint, tmp_path / "x.safetensors", "diffusers")
    with pytest.raises(ValueError, match="no names for pixart"):
        export_adapters(checkpoint, tmp_path / "x.safetensors", "kohya")
    with pytest.raises(ValueError, match="is a folder; give a name without"):
        export_adapters(checkpoint, tmp_path / "x.safetensors")
    (tmp_path / "thesis").mkdir()
    with pytest.raises(ValueError, match="would be lost"):
        export_adapters(checkpoint, tmp_path / "thesis")
    with pytest.raises(ValueError, match=r"no student of sdxl|lacks the component"):
        export_difference(checkpoint, tmp_path / "x", base("sdxl"), rank=2)
    (single,) = (base("pixart") / "transformer").glob("*.safetensors")
    with pytest.raises(ValueError, match=r"--base .* is a single file.*rmd import --base FILE .*--preset pixart"):
        export_difference(checkpoint, tmp_path / "x", single, rank=2)
    with pytest.raises(ValueError, match="no layer differs"):
        export_difference(CheckpointFolder.read(base("pixart")), tmp_path / "x", base("pixart"), rank=2)
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))
    assert (checkpoint.path / ADAPTERS).is_file()


def test_adapters_that_are_not_finite_are_refused(student: Student, tmp_path: Path) -> None:
    """A difference's factors were checked, and trained ones were not."""
    checkpoint = student("sd3", ["attention"])
    with safe_open(checkpoint.path / ADAPTERS, framework="pt") as file:
        header = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    name = next(name for name in state if ".lora_A." in name)
    out = tmp_path / "lora.safetensors"
    for value, dtype in ((math.nan, None), (1e6, torch.float16)):  # which float16 does not hold
        save(checkpoint.path / ADAPTERS, {**state, name: torch.full_like(state[name], value)}, header)
        with pytest.raises(ImportRefused, match=r"pytorch_lora_weights\.safetensors: tensor .*attn.* are not finite"):
            export_adapters(checkpoint, out, dtype=dtype)
    assert not out.exists()


def test_an_export_replaces_nothing_but_a_lora(student: Student, base: TinyFolder, tmp_path: Path) -> None:
    """Weights above all: the checkpoint's, its base's, or anybody's."""
    checkpoint = student("sd3", ["attention"])
    own = checkpoint.path / "transformer" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "link").symlink_to(checkpoint.path)
    elsewhere = Path(shutil.copy(own, tmp_path / "theirs.safetensors"))
    kept = {path: path.read_bytes() for path in (own, elsewhere)}
    within = base("sd3") / "transformer" / "lora.safetensors"
    for out in (own, tmp_path / "link" / "new.safetensors", elsewhere):
        for write in (export_adapters, lambda c, o: export_difference(c, o, base("sd3"), rank=2)):
            with pytest.raises(ValueError, match=r"lies in .* could replace|is no LoRA: it would be lost"):
                write(checkpoint, out)
    with pytest.raises(ValueError, match="lies in"):
        export_difference(checkpoint, within, base("sd3"), rank=2)
    assert {path: path.read_bytes() for path in kept} == kept and not within.exists()
    peft_folder = tmp_path / "peft"
    export_adapters(checkpoint, peft_folder, "peft")
    export_adapters(checkpoint, peft_folder, "peft")
    assert closed_to_others(peft_folder) == []
    (peft_folder / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds mine\.txt too, which would be lost"):
        export_adapters(checkpoint, peft_folder, "peft")
    file = tmp_path / "lora.safetensors"
    export_adapters(checkpoint, file)
    assert closed_to_others(file) == []
    before = file.read_bytes()
    export_adapters(checkpoint, file, dtype=torch.float16)
    assert file.read_bytes() != before


def test_targets_are_groups_or_the_ends_of_names() -> None:
    with torch.device("meta"):
        network = PixArtTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8, sample_size=32)
    groups = {group: set(adapted_layers(network, [group])) for group in EVERY_GROUP}
    block = "transformer_blocks.0"
    assert groups["convolutions"] == {"pos_embed.proj"}
    assert groups["mlp"] == {f"{block}.ff.net.0.proj", f"{block}.ff.net.2"}
    assert groups["attention"] == {
        f"{block}.attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert "proj_out" in groups["projections"] and "adaln_single.linear" in groups["projections"]
    assert (
        sum(map(len, groups.values()))
        == len(set().union(*groups.values()))
        == len(adapted_layers(network, EVERY_GROUP))
    )
    assert adapted_layers(network, ["to_q"]) == [f"{block}.attn1.to_q", f"{block}.attn2.to_q"]
    with pytest.raises(ValueError, match="no layer of PixArtTransformer2DModel is 'to_query'"):
        adapted_layers(network, ["to_q", "to_query"])
