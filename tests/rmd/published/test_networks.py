"""Students' networks and single files: in diffusers' names, in their first names, in parts; and what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from safetensors import safe_open
from torch import Tensor

from rmd.backbones.base import BackboneError
from rmd.backbones.registry import load_checkpoint
from rmd.backbones.tiny import write_tiny_folder
from rmd.published.files import ImportRefused
from rmd.sampler import sample
from rmd.size import Size
from tests.rmd.published.conftest import TinyFolder, save, weights
from tests.rmd.published.test_lora_merge import _wan_first, sd3_first

Import = Callable[..., Any]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """name -> a tiny folder with other weights than the base's."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_tiny_folder(name, tmp_path_factory.mktemp("student") / name, seed=7)
        return made[name]

    return get


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("form", ["file", "prefixed", "folder", "parts"])
def test_a_network_in_diffusers_names(
    base: TinyFolder, student: TinyFolder, imported: Import, tmp_path: Path, form: str
) -> None:
    network = student("pixart") / "transformer"
    state = weights(network)
    if form == "file":
        network = save(tmp_path / "net.safetensors", state)
    elif form == "prefixed":
        network = save(tmp_path / "net.safetensors", {f"transformer.{name}": value for name, value in state.items()})
    elif form == "parts":
        PixArtTransformer2DModel.from_pretrained(network).save_pretrained(tmp_path / "parts", max_shard_size="60KB")
        network = tmp_path / "parts" / "diffusion_pytorch_model.safetensors.index.json"
        assert len(list(network.parent.glob("*.safetensors"))) > 2
    done = imported("pixart", network=network)
    assert_same(weights(tmp_path / "out" / "transformer"), state)
    assert_same(weights(tmp_path / "out" / "vae"), weights(base("pixart") / "vae"))
    assert done.record["imported"]["network"]["name"] == network.name and not done.left_out


def test_a_student_that_the_public_rmd_trainer_wrote(
    base: TinyFolder, student: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    """Its `student_model-N` is what accelerate's save_model writes: shards and their index, no configuration."""
    network = WanTransformer3DModel.from_pretrained(student("wan-1.3b") / "transformer")
    folder = tmp_path / "student_model-300"
    Accelerator(cpu=True).save_model(network, folder, max_shard_size="40KB", safe_serialization=True)
    assert (folder / "model.safetensors.index.json").is_file() and len(list(folder.glob("*.safetensors"))) > 2
    done = imported("wan-1.3b", network=folder, preset="rmd-wan")
    assert_same(weights(tmp_path / "out" / "transformer"), weights(student("wan-1.3b") / "transformer"))
    assert_same(weights(tmp_path / "out" / "vae"), weights(base("wan-1.3b") / "vae"))
    backbone, checkpoint = load_checkpoint(tmp_path / "out", dtype=torch.float32)
    cascade = checkpoint.default_cascade
    assert done.record["imported"]["network"]["name"] == "student_model-300"
    assert (cascade.schedule_name, cascade.transition_noise_intensity, cascade.step_noise_intensity) == (
        "3+3",
        0.0,
        0.9,
    )
    sizes = (Size(32, 16, 5), Size(48, 32, 5))
    steps = tuple(replace(step, size=sizes[step.stage]) for step in cascade.steps)
    small = replace(cascade, steps=steps, full_size=sizes[1])
    latents = sample(backbone, small, backbone.encode_prompts(["a fox"]), [0])
    assert latents.shape[1:] == backbone.latent_shape(sizes[1]) and bool(torch.isfinite(latents).all())


def test_the_written_network_is_cut_into_parts_that_diffusers_reads(
    student: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    network = student("sdxl") / "unet"
    imported("sdxl", network=network, largest=200_000)
    written = tmp_path / "out" / "unet"
    assert len(list(written.glob("*.safetensors"))) > 2
    loaded = UNet2DConditionModel.from_pretrained(written).state_dict()
    assert_same(dict(loaded), weights(network))
    load_checkpoint(tmp_path / "out", dtype=torch.float32)


def test_networks_in_their_first_names_are_what_from_single_file_reads(
    base: TinyFolder, student: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    sd3 = sd3_first(weights(student("sd3") / "transformer"), 2)
    wan = {_wan_key(name): value for name, value in weights(student("wan-1.3b") / "transformer").items()}
    sdxl = {_sdxl_key(name): value for name, value in weights(student("sdxl") / "unet").items()}
    kinds: list[tuple[str, Any, dict[str, Tensor]]] = [
        ("sd3", SD3Transformer2DModel, sd3),
        ("wan-1.3b", WanTransformer3DModel, wan),
        ("sdxl", UNet2DConditionModel, {f"model.diffusion_model.{name}": value for name, value in sdxl.items()}),
    ]
    for name, kind, state in kinds:
        file = save(tmp_path / f"{name}.safetensors", state)
        component = "unet" if name == "sdxl" else "transformer"
        config = str(base(name) / component)
        oracle = kind.from_single_file(str(file), config=config, local_files_only=True, torch_dtype=torch.float32)
        imported(name, network=file, out=tmp_path / name)
        assert_same(weights(tmp_path / name / component), dict(oracle.state_dict()))
        assert_same(weights(tmp_path / name / component), weights(student(name) / component))


def _wan_key(name: str) -> str:
    for ours, first in (
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("proj_out", "head.head"),
        ("norm2", "norm3"),
    ):
        name = name.replace(ours, first)
    if name == "scale_shift_table":
        return "head.modulation"
    return _wan_first(name).replace("scale_shift_table", "modulation")


def _sdxl_key(name: str) -> str:
    """A parameter of the tiny UNet under its name in SDXL's first code."""
    import re

    for ours, first in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.2.conv"),
    ):
        name = name.replace(ours, first)

    def place(match: re.Match[str]) -> str:
        side, block, kind, layer = match[1], int(match[2] or 0), match[3], int(match[4])
        second = int(kind == "attentions")
        if side == "down":
            return f"input_blocks.{1 + 2 * block + layer}.{second}."
        if side == "up":
            return f"output_blocks.{2 * block + layer}.{second}."
        return f"middle_block.{1 if second else 2 * layer}."

    moved = re.sub(r"(down|mid|up)_blocks?\.(?:(\d)\.)?(resnets|attentions)\.(\d)\.", place, name)
    if "resnets" in name:
        for ours, first in (
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
            ("conv_shortcut", "skip_connection"),
        ):
            moved = moved.replace(ours, first)
    return moved


def test_a_key_without_a_place_is_an_error_that_lists_it(
    base: TinyFolder, student: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    """FastWan's attention gates: without them the network is another one."""
    state = weights(student("wan-1.3b") / "transformer")
    gates = {f"blocks.{i}.to_gate_compress.weight": torch.randn(24, 24) for i in range(2)}
    file = save(tmp_path / "fastwan.safetensors", {**state, **gates})
    with pytest.raises(ImportRefused, match=r"2 keys .*blocks\.0\.to_gate_compress\.weight.*--allow-unmatched"):
        imported("wan-1.3b", network=file)
    assert not (tmp_path / "out").exists()
    done = imported("wan-1.3b", network=file, allow_unmatched=True)
    assert list(done.left_out) == [f"fastwan.safetensors: {key}" for key in sorted(gates)]
    stored = json.loads((tmp_path / "out" / "cascade.json").read_text())
    assert stored["distillation"]["imported"]["left_out"] == list(done.left_out)
    assert_same(weights(tmp_path / "out" / "transformer"), state)
    # The same in a base's own folder, and for whoever loads such a folder without importing it.
    whole = tmp_path / "whole"
    shutil.copytree(base("wan-1.3b"), whole)
    save(whole / "transformer" / "diffusion_pytorch_model.safetensors", {**state, **gates})
    with pytest.raises(ImportRefused, match="to_gate_compress"):
        imported("wan-1.3b", base=str(whole))
    (whole / "cascade.json").write_text(json.dumps({**json.loads((whole / "cascade.json").read_text()), "weights": {}}))
    with pytest.raises(BackboneError, match=r"2 weights that WanTransformer3DModel has no .*to_gate_compress"):
        load_checkpoint(whole)


def test_a_key_that_diffusers_converter_drops_is_counted_too(
    student: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    state = {_sdxl_key(name): value for name, value in weights(student("sdxl") / "unet").items()}
    state["middle_block.1.gate.weight"] = torch.randn(4, 4)
    state["label_emb.1.weight"] = torch.randn(4, 4)
    file = save(tmp_path / "unet.safetensors", state)
    with pytest.raises(
        ImportRefused, match=r"2 keys that UNet2DConditionModel has no place for: .*label_emb\.1\.weight"
    ):
        imported("sdxl", network=file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("proj_out.weight"), r"lacks 1 weights of WanTransformer3DModel: proj_out\.weight"),
        (lambda s: s.update({"proj_out.weight": torch.randn(64, 48)}), r"proj_out\.weight \[64, 48\] for \[64, 24\]"),
        (lambda s: s["proj_out.weight"][1, 2].fill_(float("nan")), r"net\.saf\w+: tensor 'proj_out.*not finite"),
        (lambda s: s.update({"blocks.0.attn1.to_q.scale_weight": torch.ones(1)}), "fp8 file with scales.*scale_weight"),
        (lambda s: s.update({"scaled_fp8": torch.ones(2).to(torch.float8_e4m3fn)}), "fp8 file with scales.*scaled_fp8"),
        (lambda s: s.update({"v_pred": torch.ones(0)}), "predicts velocity"),
    ],
)  # fmt: skip
def test_networks_that_are_not_whole_or_not_theirs(
    student: TinyFolder, imported: Import, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    state = weights(student("wan-1.3b") / "transformer")
    change(state)
    file = save(tmp_path / "net.safetensors", state)
    with pytest.raises(ImportRefused, match=message):
        imported("wan-1.3b", network=file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.safetensors"]


def test_plain_fp8_is_widened(student: TinyFolder, imported: Import, tmp_path: Path) -> None:
    state = {
        name: value.to(torch.float8_e4m3fn) for name, value in weights(student("wan-1.3b") / "transformer").items()
    }
    imported("wan-1.3b", network=save(tmp_path / "net.safetensors", state))
    found = weights(tmp_path / "out" / "transformer")
    assert all(torch.equal(found[name], value.to(torch.bfloat16)) for name, value in state.items())


def test_a_network_of_another_family_fits_no_base(student: TinyFolder, imported: Import, tmp_path: Path) -> None:
    file = save(tmp_path / "net.safetensors", weights(student("pixart") / "transformer"))
    with pytest.raises(ImportRefused, match="fits no WanTransformer3DModel"):
        imported("wan-1.3b", network=file)
    with pytest.raises(ImportRefused, match="fits no UNet2DConditionModel"):
        imported("sdxl", network=file)


def test_a_guidance_input_is_refused_before_anything_is_written(
    base: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    config = UNet2DConditionModel.load_config(base("sdxl") / "unet")
    UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 16}).save_pretrained(tmp_path / "lcm")
    with pytest.raises(ImportRefused, match=r"takes its guidance as an input \(time_cond_proj_dim\)"):
        imported("sdxl", network=tmp_path / "lcm")
    with pytest.raises(ImportRefused, match=r"time_embedding\.cond_proj\.weight"):
        imported("sdxl", network=tmp_path / "lcm" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("guidance", [1.0, 8.0])
def test_a_guidance_input_is_folded_into_a_bias(
    base: TinyFolder, imported: Import, tmp_path: Path, guidance: float
) -> None:
    """The stock UNet, told its guidance, and the imported one, which no longer asks: the same prediction."""
    config = UNet2DConditionModel.load_config(base("sdxl") / "unet")
    asks = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 16})
    asks.save_pretrained(tmp_path / "lcm")
    done = imported("sdxl", network=tmp_path / "lcm", preset="lcm-sdxl-unet", fold_guidance=guidance)
    assert done.record["imported"]["folded_guidance"] == guidance and not done.left_out
    told = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    assert told.config.time_cond_proj_dim is None
    given = torch.randn(1, 4, 8, 8), torch.tensor([759]), torch.randn(1, 5, 64)
    added = {"added_cond_kwargs": {"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)}}
    code = get_guidance_scale_embedding(torch.tensor([guidance - 1]), 16)
    with torch.no_grad():
        expected = asks(*given, timestep_cond=code, **added).sample
        torch.testing.assert_close(told(*given, **added).sample, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ImportRefused, match=r"--fold-guidance: .* has no time_cond_proj_dim"):
        imported("sdxl", network=tmp_path / "lcm" / "diffusion_pytorch_model.safetensors", fold_guidance=guidance)


def test_a_lora_on_what_the_guidance_is_folded_through_is_refused(
    base: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    """The bias is folded with the weight as it is without the LoRA: another picture, without a word."""
    config = UNet2DConditionModel.load_config(base("sdxl") / "unet")
    asks = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 16})
    asks.save_pretrained(tmp_path / "lcm")
    rows, columns = asks.time_embedding.linear_1.weight.shape
    module = "unet.time_embedding.linear_1"
    factors = {f"{module}.lora_A.weight": torch.ones(4, columns), f"{module}.lora_B.weight": torch.ones(rows, 4)}
    save(tmp_path / "style.safetensors", factors)
    options: dict[str, Any] = {"network": tmp_path / "lcm", "preset": "lcm-sdxl-unet", "fold_guidance": 8.0}
    with pytest.raises(ImportRefused, match=r"style\.safetensors changes 'time_embedding\.linear_1\.weight', through"):
        imported("sdxl", loras=[(tmp_path / "style.safetensors", 1.0)], **options)


def get_guidance_scale_embedding(w: Tensor, width: int) -> Tensor:
    """diffusers' own, which is a method of its pipelines."""
    code: Tensor = StableDiffusionXLPipeline.get_guidance_scale_embedding(None, w, embedding_dim=width)
    return code


def all_in_one(folder: Path) -> dict[str, Tensor]:
    """SDXL in one file, as its first code keeps it."""
    state = {f"model.diffusion_model.{_sdxl_key(name)}": value for name, value in weights(folder / "unet").items()}
    state |= {f"first_stage_model.{key}": value for key, value in _first_vae(weights(folder / "vae")).items()}
    clip = "conditioner.embedders.0.transformer.text_model."
    for name, value in weights(folder / "text_encoder").items():
        state[clip + name.removeprefix("text_model.")] = value
    state |= {f"conditioner.embedders.1.model.{key}": value for key, value in _open_clip(folder).items()}
    state["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["conditioner.embedders.1.model.logit_scale"] = torch.ones(())
    return state


def _first_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    import re

    blocks = 4
    made = {}
    for name, value in state.items():
        key = name
        key = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", key)
        key = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", key)
        key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        if "mid_block.attentions.0" in key:
            for ours, first in (
                ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"),
            ):  # fmt: skip
                key = key.replace(ours, first)
            key = key.replace("mid_block.attentions.0", "mid.attn_1")
            if value.ndim == 2:
                value = value[:, :, None, None]
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        made[key] = value
    return made


def _open_clip(folder: Path) -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): value for name, value in weights(folder / "text_encoder_2").items()}
    made = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    for layer in range(2):
        ours, first = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [state[f"{ours}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            made[f"{first}attn.in_proj_{kind}"] = torch.cat(parts)
            for a, b in (
                ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                made[f"{first}{b}.{kind}"] = state[f"{ours}{a}.{kind}"]
    return made


def test_an_all_in_one_file_is_taken_apart_as_from_single_file_does(
    base: TinyFolder, student: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    file = save(tmp_path / "turbo.safetensors", all_in_one(student("sdxl")))
    # Configurations and tokenizers alone: every weight has to come out of the file.
    bare = tmp_path / "bare"
    shutil.copytree(base("sdxl"), bare, ignore=shutil.ignore_patterns("*.safetensors", "cascade.json"))
    with pytest.raises(ImportRefused, match="--config FOLDER"):
        imported("sdxl", base=str(file))
    done = imported("sdxl", base=str(file), config=bare)
    oracle: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_single_file(
            str(file), config=str(bare), subfolder="unet", local_files_only=True
        ),
        "vae": AutoencoderKL.from_single_file(str(file), config=str(bare), subfolder="vae", local_files_only=True),
    }
    for component, model in oracle.items():
        assert_same(weights(tmp_path / "out" / component), dict(model.state_dict()))
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    first = StableDiffusionXLPipeline.from_pretrained(student("sdxl"), torch_dtype=torch.float32)
    for component in ("text_encoder", "text_encoder_2"):
        assert_same(dict(getattr(pipe, component).state_dict()), dict(getattr(first, component).state_dict()))
    assert {key.partition(": ")[2].rpartition(".")[2] for key in done.left_out} == {"position_ids", "logit_scale"}
    assert done.record["imported"]["base"]["name"] == "turbo.safetensors"
    with safe_open(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as written:
        assert len(written.keys()) == len(weights(student("sdxl") / "unet"))


def test_an_all_in_one_file_with_more_in_it(
    base: TinyFolder, student: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    state = {**all_in_one(student("sdxl")), "model_ema.decay": torch.ones(()), "control.weight": torch.ones(2)}
    file = save(tmp_path / "x.safetensors", state)
    with pytest.raises(ImportRefused, match=r"2 keys of other parts, such as control\.weight, model_ema\.decay"):
        imported("sdxl", base=str(file), config=base("sdxl"))
    with pytest.raises(ImportRefused, match="whole checkpoint as --base"):
        imported("sdxl", network=file)
