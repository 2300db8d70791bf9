"""LoRAs in every published naming: the merged weights are those of diffusers' and peft's own loading and fusing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import (
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from peft import LoraConfig
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.rmd.published.conftest import TinyFolder, assert_equal_weights, kohya, random_lora, save, weights

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
Import = Callable[..., Any]


def fused(
    pipeline: type, folder: Path, files: list[tuple[Path, float]], components: list[str]
) -> dict[str, dict[str, Tensor]]:
    """component -> its weights after diffusers has loaded and fused the LoRAs, one after the other."""
    pipe = pipeline.from_pretrained(folder, torch_dtype=torch.float32)  # type: ignore[attr-defined]
    for path, strength in files:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        pipe.fuse_lora(components=components, lora_scale=strength)
        pipe.unload_lora_weights()
    return {component: getattr(pipe, component).state_dict() for component in components}


def unet_lora(folder: Path, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    targets = options.pop(
        "targets", [*ATTENTION, "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut", "time_emb_proj"]
    )
    config = LoraConfig(r=options.pop("r", 4), lora_alpha=4, target_modules=targets, **options)
    return random_lora(UNet2DConditionModel.from_pretrained(folder / "unet"), config, seed)


def test_diffusers_files_with_a_text_encoders_part_and_settings(
    base: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    folder = base("sdxl")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=ATTENTION, rank_pattern={"mid_block.*to_q": 2}, alpha_pattern={"to_k": 2}
    )
    unet = random_lora(UNet2DConditionModel.from_pretrained(folder / "unet"), config)
    clip = LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "v_proj", "fc1"])
    texts = {
        "text_encoder": random_lora(CLIPTextModel.from_pretrained(folder / "text_encoder"), clip, 1),
        "text_encoder_2": random_lora(CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"), clip, 2),
    }
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=unet,
        text_encoder_lora_layers=texts["text_encoder"],
        text_encoder_2_lora_layers=texts["text_encoder_2"],
        unet_lora_adapter_metadata=_settings(config),
        text_encoder_lora_adapter_metadata=_settings(clip),
        text_encoder_2_lora_adapter_metadata=_settings(clip),
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    components = ["unet", "text_encoder", "text_encoder_2"]
    oracle = fused(StableDiffusionXLPipeline, folder, [(file, 0.7)], components)
    imported("sdxl", loras=((file, 0.7),))
    for component in components:
        before = weights(folder / component)
        found = weights(tmp_path / "out" / component)
        assert found.keys() == before.keys()
        assert_equal_weights(_plain(found), _plain(oracle[component]), _plain(before))


def _settings(config: LoraConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if value is not None and not callable(value)}


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers stores some text models under a prefix that they no longer have when loaded."""
    return {name.removeprefix("text_model."): value for name, value in state.items()}


@pytest.mark.parametrize("blocks", ["diffusers", "first"])
def test_kohya_files_of_sdxl_with_alphas_and_text_encoders(
    base: TinyFolder, imported: Import, tmp_path: Path, blocks: str
) -> None:
    folder = base("sdxl")
    state = unet_lora(folder)
    named = kohya(state, "lora_unet_", (2.0,))
    if blocks == "first":
        named = {_sgm(key): value for key, value in named.items()}
        assert sum("input_blocks" in key for key in named) > 20
        extra = {"lora_unet_time_embed_0": (128, 32), "lora_unet_label_emb_0_2": (128, 128)}
        for module, (rows, columns) in extra.items():
            named[f"{module}.lora_down.weight"] = 0.1 * torch.randn(4, columns)
            named[f"{module}.lora_up.weight"] = 0.1 * torch.randn(rows, 4)
            named[f"{module}.alpha"] = torch.tensor(2.0)
    clip = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "out_proj", "fc2"])
    for number, kind in ((1, CLIPTextModel), (2, CLIPTextModelWithProjection)):
        component = "text_encoder" if number == 1 else "text_encoder_2"
        text = random_lora(kind.from_pretrained(folder / component), clip, number)
        text = {"text_model." + name.removeprefix("text_model."): value for name, value in text.items()}
        named |= kohya(text, f"lora_te{number}_", (1.0,))
    file = save(tmp_path / "style.safetensors", named)
    components = ["unet", "text_encoder", "text_encoder_2"]
    oracle = fused(StableDiffusionXLPipeline, folder, [(file, 1.0)], components)
    imported("sdxl", loras=((file, 1.0),))
    for component in components:
        found, before = weights(tmp_path / "out" / component), weights(folder / component)
        assert_equal_weights(_plain(found), _plain(oracle[component]), _plain(before))


def test_every_module_has_its_own_alpha_and_rank(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    """diffusers finds no alpha of an attention's module where a file's alphas differ, so the oracle is the formula."""
    folder = base("sdxl")
    state = unet_lora(folder, rank_pattern={"to_q": 2, "conv1": 3})
    alphas = (1.0, 4.0, 0.5)
    expected = weights(folder / "unet")
    before = dict(expected)
    for number, module in enumerate(dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in state)):
        down, up = state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"]
        weight = expected[f"{module}.weight"]
        delta = alphas[number % 3] / down.shape[0] * up.flatten(1) @ down.flatten(1)
        expected[f"{module}.weight"] = weight + delta.reshape(weight.shape)
    imported("sdxl", loras=((save(tmp_path / "mixed.safetensors", kohya(state, "lora_unet_", alphas)), 1.0),))
    assert_equal_weights(weights(tmp_path / "out" / "unet"), expected, before)


def _sgm(key: str, layers: int = 1) -> str:
    """A kohya key of a UNet with so many layers a block under the names of SDXL's first code."""

    def inner(name: str) -> str:
        for ours, first in (
            ("conv1", "in_layers_2"),
            ("conv2", "out_layers_3"),
            ("time_emb_proj", "emb_layers_1"),
            ("conv_shortcut", "skip_connection"),
        ):
            name = name.replace(ours, first)
        return name

    def place(match: re.Match[str]) -> str:
        side, block, kind, layer = match[1], int(match[2] or 0), match[3], int(match[4])
        second = int(kind == "attentions")
        if side == "down":
            return f"input_blocks_{1 + (layers + 1) * block + layer}_{second}_"
        if side == "up":
            return f"output_blocks_{(layers + 1) * block + layer}_{second}_"
        return f"middle_block_{1 if second else 2 * layer}_"

    return inner(re.sub(r"(down|mid|up)_blocks?_(?:(\d)_)?(resnets|attentions)_(\d)_", place, key))


def test_two_loras_are_added_in_float32_and_rounded_once(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    folder = base("sdxl")
    files = [
        (save(tmp_path / "student.safetensors", kohya(unet_lora(folder), "lora_unet_", (2.0,))), 1.0),
        (save(tmp_path / "style.safetensors", kohya(unet_lora(folder, 5, r=2), "lora_unet_")), -0.3),
    ]
    oracle = fused(StableDiffusionXLPipeline, folder, files, ["unet"])["unet"]
    done = imported("sdxl", loras=files, dtype=torch.bfloat16)
    found = weights(tmp_path / "out" / "unet")
    different = [name for name, value in oracle.items() if not torch.equal(found[name], value.to(torch.bfloat16))]
    # The oracle rounds to float32 between the two, which may tip a tie; nothing else may differ.
    assert sum(int((found[name] != oracle[name].to(torch.bfloat16)).sum()) for name in different) <= 5
    record = done.record["imported"]["loras"]
    assert [(lora["name"], lora["strength"], lora["scales"]) for lora in record] == [
        ("student.safetensors", 1.0, [0.5]),
        ("style.safetensors", -0.3, [-0.3]),
    ]


def test_diffusers_oldest_names_of_attention_processors(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    folder = base("sdxl")
    state = unet_lora(folder, targets=ATTENTION)
    old = {}
    for name, value in state.items():
        module, _, factor = name.rpartition(".lora_")
        attention, _, projection = module.replace("to_out.0", "to_out").rpartition(".")
        part = "down" if factor.startswith("A") else "up"
        old[f"unet.{attention}.processor.{projection}_lora.{part}.weight"] = value
    file = save(tmp_path / "old.safetensors", old)
    oracle = fused(StableDiffusionXLPipeline, folder, [(file, 1.0)], ["unet"])["unet"]
    imported("sdxl", loras=((file, 1.0),))
    assert_equal_weights(weights(tmp_path / "out" / "unet"), oracle, weights(folder / "unet"))


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize(
    ("name", "kind", "targets"),
    [
        ("pixart", PixArtTransformer2DModel, [*ATTENTION, "linear_1", "proj_out"]),
        ("sd3", SD3Transformer2DModel, [*ATTENTION, "add_q_proj", "add_k_proj", "to_add_out"]),
        ("wan-1.3b", WanTransformer3DModel, [*ATTENTION, "ffn.net.2", "patch_embedding"]),
    ],
)
def test_peft_folders_obey_their_settings(
    base: TinyFolder, imported: Import, tmp_path: Path, name: str, kind: Any, targets: list[str], rank_stabilised: bool
) -> None:
    folder = base(name)
    config = LoraConfig(
        r=4, lora_alpha=3, target_modules=targets, use_rslora=rank_stabilised,
        rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 7, "^transformer_blocks.0.*to_q": 5},
    )  # fmt: skip
    model = peft.get_peft_model(kind.from_pretrained(folder / "transformer"), config)
    for parameter in (value for key, value in model.named_parameters() if "lora_" in key):
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    oracle = model.merge_and_unload().state_dict()
    imported(name, loras=((tmp_path / "adapter", 1.0),))
    assert_equal_weights(weights(tmp_path / "out" / "transformer"), oracle, weights(folder / "transformer"))


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("as_file", [True, False])
def test_a_peft_adapter_is_scaled_by_its_settings_however_it_is_named(
    base: TinyFolder, imported: Import, tmp_path: Path, prefixed: bool, as_file: bool
) -> None:
    """Its weight file lies beside them, and some tools save without peft's prefix."""
    folder = base("pixart")
    config = LoraConfig(r=2, lora_alpha=16, target_modules=ATTENTION)
    model = peft.get_peft_model(PixArtTransformer2DModel.from_pretrained(folder / "transformer"), config)
    for parameter in (value for key, value in model.named_parameters() if "lora_" in key):
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    if not prefixed:
        save(file, {key.removeprefix("base_model.model."): value for key, value in weights(file.parent).items()})
    imported("pixart", loras=((file if as_file else file.parent, 1.0),))
    oracle = model.merge_and_unload().state_dict()
    assert_equal_weights(weights(tmp_path / "out" / "transformer"), oracle, weights(folder / "transformer"))


def wan_lora(folder: Path) -> dict[str, Tensor]:
    config = LoraConfig(r=4, target_modules=[*ATTENTION, "ffn.net.0.proj", "ffn.net.2"])
    return random_lora(WanTransformer3DModel.from_pretrained(folder / "transformer"), config)


def _wan_first(module: str) -> str:
    blocks = [("attn1", "self_attn"), ("attn2", "cross_attn"), ("net.0.proj", "0"), ("net.2", "2")]
    for ours, first in [*blocks, ("to_out.0", "o"), ("to_", "")]:
        module = module.replace(ours, first)
    return module


@pytest.mark.parametrize("naming", ["first, down and up", "first, A and B", "kohya", "diffusers"])
def test_wans_namings(base: TinyFolder, imported: Import, tmp_path: Path, naming: str) -> None:
    folder = base("wan-1.3b")
    state = wan_lora(folder)
    first = {}
    for name, value in state.items():
        module, _, factor = name.rpartition(".lora_")
        part = (
            ("lora_A" if factor[0] == "A" else "lora_B")
            if "A and" in naming
            else "lora_down"
            if factor[0] == "A"
            else "lora_up"
        )
        first[f"diffusion_model.{_wan_first(module)}.{part}.weight"] = value
    if "down" in naming:
        for module in {key.rsplit(".lora_", 1)[0] for key in first}:
            first[f"{module}.alpha"] = torch.tensor(2.0)
        first |= {
            "diffusion_model.text_embedding.0.lora_down.weight": 0.1 * torch.randn(4, 32),
            "diffusion_model.text_embedding.0.lora_up.weight": 0.1 * torch.randn(24, 4),
            "diffusion_model.text_embedding.2.lora_down.weight": 0.1 * torch.randn(4, 24),
            "diffusion_model.text_embedding.2.lora_up.weight": 0.1 * torch.randn(24, 4),
            "diffusion_model.text_embedding.0.diff_b": 0.1 * torch.randn(24),
            "diffusion_model.blocks.1.self_attn.q.diff_b": 0.1 * torch.randn(24),
            "diffusion_model.head.head.lora_down.weight": 0.1 * torch.randn(4, 24),
            "diffusion_model.head.head.lora_up.weight": 0.1 * torch.randn(64, 4),
        }
    if naming == "kohya":
        first = kohya(
            {
                name.replace(name.rpartition(".lora_")[0], _wan_first(name.rpartition(".lora_")[0])): value
                for name, value in state.items()
            },
            "lora_unet_",
            (2.0, 1.0),
        )
    if naming == "diffusers":
        first = {f"transformer.{name}": value for name, value in state.items()}
    file = save(tmp_path / "wan.safetensors", first)
    oracle = fused(WanPipeline, folder, [(file, 0.8)], ["transformer"])["transformer"]
    imported("wan-1.3b", loras=((file, 0.8),))
    assert_equal_weights(weights(tmp_path / "out" / "transformer"), oracle, weights(folder / "transformer"))


def test_whole_differences_of_norms_and_tables_are_added(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    """diffusers drops these keys; what they are is said by their names: W + strength * diff."""
    folder = base("wan-1.3b")
    before = weights(folder / "transformer")
    places = {
        "blocks.0.self_attn.norm_k.diff": "blocks.0.attn1.norm_k.weight",
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.1.diff_m": "blocks.1.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "patch_embedding.diff": "patch_embedding.weight",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
    }
    state = {f"diffusion_model.{key}": torch.randn(before[name].shape) for key, name in places.items()}
    imported("wan-1.3b", loras=((save(tmp_path / "x.safetensors", state), 0.5),))
    found = weights(tmp_path / "out" / "transformer")
    for key, name in places.items():
        expected = before.pop(name) + 0.5 * state[f"diffusion_model.{key}"]
        assert torch.allclose(found.pop(name), expected, rtol=0, atol=1e-6), key
    assert all(torch.equal(found[name], value) for name, value in before.items())


def sd3_first(state: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """SD3's weights under its first names, in the shapes of its first code."""

    def swap(value: Tensor) -> Tensor:
        return torch.cat(value.chunk(2)[::-1])

    first = {"pos_embed": state["pos_embed.pos_embed"]}
    for kind in ("weight", "bias"):
        for ours, theirs in {
            "pos_embed.proj": "x_embedder.proj",
            "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
            "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
            "context_embedder": "context_embedder",
            "proj_out": "final_layer.linear",
        }.items():
            first[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
        first[f"final_layer.adaLN_modulation.1.{kind}"] = swap(state[f"norm_out.linear.{kind}"])
        for block in range(blocks):
            ours, theirs = f"transformer_blocks.{block}", f"joint_blocks.{block}"
            get = lambda name, ours=ours, kind=kind: state.get(f"{ours}.{name}.{kind}")  # noqa: E731
            last = block == blocks - 1
            for stream, names in (
                ("x_block.attn", "attn.to_{}"),
                ("context_block.attn", "attn.add_{}_proj"),
                ("x_block.attn2", "attn2.to_{}"),
            ):
                parts = [get(names.format(letter)) for letter in "qkv"]
                if parts[0] is not None:
                    first[f"{theirs}.{stream}.qkv.{kind}"] = torch.cat(parts)
            text_norm = get("norm1_context.linear")
            for module, value in {
                "x_block.attn.proj": get("attn.to_out.0"),
                "context_block.attn.proj": get("attn.to_add_out"),
                "x_block.attn2.proj": get("attn2.to_out.0"),
                "x_block.adaLN_modulation.1": get("norm1.linear"),
                "context_block.adaLN_modulation.1": swap(text_norm) if last else text_norm,
                "x_block.mlp.fc1": get("ff.net.0.proj"),
                "x_block.mlp.fc2": get("ff.net.2"),
                "context_block.mlp.fc1": get("ff_context.net.0.proj"),
                "context_block.mlp.fc2": get("ff_context.net.2"),
                "x_block.attn.ln_q": get("attn.norm_q"),
                "x_block.attn.ln_k": get("attn.norm_k"),
                "context_block.attn.ln_q": get("attn.norm_added_q"),
                "context_block.attn.ln_k": get("attn.norm_added_k"),
                "x_block.attn2.ln_q": get("attn2.norm_q"),
                "x_block.attn2.ln_k": get("attn2.norm_k"),
            }.items():
                if value is not None:
                    first[f"{theirs}.{module}.{kind}"] = value
    return first


@pytest.mark.parametrize("naming", ["kohya", "dotted"])
def test_sd3s_first_names_merge_as_in_the_first_code(
    base: TinyFolder, imported: Import, tmp_path: Path, naming: str
) -> None:
    """The oracle: merge in the first code's own weights, then let diffusers convert the whole checkpoint."""
    folder = base("sd3")
    before = weights(folder / "transformer")
    whole = sd3_first(before, 2)
    same = convert_sd3_transformer_checkpoint_to_diffusers(dict(whole))
    assert all(torch.equal(same[name], value) for name, value in before.items())
    state: dict[str, Tensor] = {}
    for key, value in list(whole.items()):
        if not key.endswith(".weight") or value.ndim < 2:
            continue
        module = key.removesuffix(".weight")
        down, up = 0.1 * torch.randn(3, *value.shape[1:]), 0.1 * torch.randn(value.shape[0], 3)
        flat = f"lora_unet_{module.replace('.', '_')}" if naming == "kohya" else f"diffusion_model.{module}"
        state |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.5)}
        whole[key] = value + (0.5 * up @ down.flatten(1)).reshape(value.shape)
    imported("sd3", loras=((save(tmp_path / "sd3.safetensors", state), 1.0),))
    oracle = convert_sd3_transformer_checkpoint_to_diffusers(whole)
    assert_equal_weights(weights(tmp_path / "out" / "transformer"), oracle, before)


def test_sd3_in_diffusers_names_with_a_text_encoder(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    folder = base("sd3")
    config = LoraConfig(r=4, lora_alpha=4, target_modules=[*ATTENTION, "norm1.linear", "ff_context.net.2"])
    network = random_lora(SD3Transformer2DModel.from_pretrained(folder / "transformer"), config)
    clip = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "fc2"])
    text = random_lora(CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"), clip, 3)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=network, text_encoder_2_lora_layers=text
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    oracle = fused(StableDiffusion3Pipeline, folder, [(file, 1.0)], ["transformer", "text_encoder_2"])
    imported("sd3", loras=((file, 1.0),))
    for component, expected in oracle.items():
        assert_equal_weights(weights(tmp_path / "out" / component), expected, weights(folder / component))


def test_what_was_merged_stands_in_the_record_and_the_card(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    from rmd.checkpoint import CheckpointFolder
    from rmd.weight_files import file_digest

    state = {f"transformer.{name}": value for name, value in wan_lora(base("wan-1.3b")).items()}
    file = save(tmp_path / "student.safetensors", state, {"modelspec.license": "apache-2.0"})
    imported("wan-1.3b", loras=((file, 0.125),))
    record = CheckpointFolder.read(tmp_path / "out").distillation
    assert record["method"] == "import" and record["preset"] == "wan"
    (lora,) = record["imported"]["loras"]
    assert lora["sha256"] == {"student.safetensors": file_digest(file)}
    assert (lora["licence"], lora["strength"], lora["parameters"]) == ("apache-2.0", 0.125, 20)
    base_files = record["imported"]["base"]["sha256"]
    weight = "transformer/diffusion_pytorch_model.safetensors"
    assert base_files[weight] == file_digest(base("wan-1.3b") / weight)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "student.safetensors" in card and "apache-2.0" in card and lora["sha256"]["student.safetensors"][:16] in card
    assert str(tmp_path) not in json.dumps(record) + card
