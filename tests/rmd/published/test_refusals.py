"""What is not taken: each in one sentence that names the file and the way out, and nothing is written."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor

from rmd.checkpoint import CheckpointFolder
from rmd.published.files import ImportRefused, WeightFiles
from rmd.published.gathering import ImportRequest, gather, lacks_student
from tests.rmd.published.conftest import TinyFolder, kohya, save, weights

Import = Callable[..., Any]


def _archive(path: Path, _: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model_index.json", "{}")


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize("option", ["network", "loras", "base"])
@pytest.mark.parametrize(
    ("name", "write", "content", "message"),
    [
        ("model.ckpt", _write, b"\x80\x02}", r"model\.ckpt is a pickled file.*weights_only=True.*save_file"),
        ("pytorch_model.bin", _write, b"\x80\x02}", r"pytorch_model\.bin is a pickled file"),
        ("model.pt", _write, b"\x80\x02}", r"model\.pt is a pickled file"),
        ("model.zip", _archive, b"", r"model\.zip is a zip archive: unpack it"),
        ("model.safetensors", _archive, b"", r"model\.safetensors is a zip archive.*torch\.save"),
        ("model.gguf", _write, b"GGUF\x03\x00", r"model\.gguf is a GGUF file"),
        ("notes.txt", _write, b"hello", r"notes\.txt is not a \.safetensors file"),
        ("model.safetensors", _write, b"version https://git-lfs", r"Git LFS pointer"),
    ],
)
def test_other_formats(
    base: TinyFolder, imported: Import, tmp_path: Path, option: str, name: str, write: Any, content: bytes, message: str
) -> None:
    file = tmp_path / name
    write(file, content)
    given: dict[str, Any] = {"loras": ((file, 1.0),)} if option == "loras" else {option: file}
    if option == "base":
        given = {"base": str(file), "config": base("wan-1.3b")}
    with pytest.raises(ImportRefused, match=message):
        imported("wan-1.3b", **given)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_truncated_file(base: TinyFolder, imported: Import, tmp_path: Path, lora: dict[str, Tensor]) -> None:
    file = save(tmp_path / "lora.safetensors", lora)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ImportRefused, match=r"lora\.safetensors is cut short"):
        imported("wan-1.3b", loras=((file, 1.0),))


def test_pickles_beside_safetensors_stay_behind(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    """As DMD2's and many others' repositories have it."""
    both = tmp_path / "both"
    shutil.copytree(base("sdxl"), both)
    (both / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}")
    (both / "vae" / "model.onnx").write_bytes(b"x")
    imported("sdxl", base=str(both))
    assert sorted(path.name for path in (tmp_path / "out" / "vae").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    CheckpointFolder.read(tmp_path / "out")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"transformer.blocks.0.attn1.to_q.lora_magnitude_vector": torch.ones(24)}, "is DoRA"),
        ({"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(24)}, "is DoRA"),
        ({"lora_unet_blocks_0_self_attn_q.hada_w1_a": torch.ones(2, 2)}, "is LoHa"),
        ({"lora_unet_blocks_0_self_attn_q.lokr_w1": torch.ones(2, 2)}, "is LoKr"),
        ({"lora_unet_blocks_0_self_attn_q.lora_mid.weight": torch.ones(2, 2)}, "is a LoRA with a third factor"),
        ({"transformer.blocks.0.attn1.to_q.weight_scale": torch.ones(1)}, "is an fp8 file with scales"),
        ({"transformer.blocks.0.attn1.to_q.weight_scale_inv": torch.ones(1)}, "is an fp8 file with scales"),
    ],
)
def test_kinds_that_are_computed_otherwise(
    imported: Import, tmp_path: Path, lora: dict[str, Tensor], extra: dict[str, Tensor], message: str
) -> None:
    file = save(tmp_path / "x.safetensors", {**lora, **extra})
    for allow in (False, True):
        with pytest.raises(
            ImportRefused, match=rf"x\.safetensors {message}.*not supported: it holds '{next(iter(extra))}'"
        ):
            imported("wan-1.3b", loras=((file, 1.0),), allow_unmatched=allow)


def test_dora_by_its_settings(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    import peft

    model = WanTransformer3DModel.from_pretrained(base("wan-1.3b") / "transformer")
    peft.get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"], use_dora=True)).save_pretrained(
        tmp_path / "dora"
    )
    with pytest.raises(ImportRefused, match=r"adapter_config\.json: DoRA"):
        imported("wan-1.3b", loras=((tmp_path / "dora", 1.0),))
    (tmp_path / "dora" / "adapter_config.json").unlink()
    with pytest.raises(ImportRefused, match=r"has no adapter_config\.json"):
        imported("wan-1.3b", loras=((tmp_path / "dora", 1.0),))


def test_peft_settings_that_cannot_be_computed_with(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    import peft

    model = WanTransformer3DModel.from_pretrained(base("wan-1.3b") / "transformer")
    settings = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa_niter_2")
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "pissa")
    with pytest.raises(ImportRefused, match=r"adapter_config\.json: init_lora_weights 'pissa_niter_2' changes"):
        imported("wan-1.3b", loras=((tmp_path / "pissa", 1.0),))
    file = tmp_path / "pissa" / "adapter_config.json"
    plain = {**json.loads(file.read_text()), "init_lora_weights": True}
    file.write_text(json.dumps({**plain, "alpha_pattern": {"blocks.(0": 4}}))
    with pytest.raises(ImportRefused, match=r"adapter_config\.json: .*unterminated subpattern"):
        imported("wan-1.3b", loras=((tmp_path / "pissa", 1.0),))
    others = {"init_lora_weights": "lora_ga", "use_qalora": True, "fan_in_fan_out": True, "layer_replication": [[0, 2]]}
    for name, value in others.items():
        file.write_text(json.dumps({**plain, name: value}))
        with pytest.raises(ImportRefused, match=rf"adapter_config\.json: {name} "):
            imported("wan-1.3b", loras=((tmp_path / "pissa", 1.0),))


def test_one_module_under_two_names(imported: Import, tmp_path: Path, lora: dict[str, Tensor]) -> None:
    flat = kohya({name.removeprefix("transformer."): value for name, value in lora.items()}, "lora_unet_")
    twice = save(tmp_path / "twice.safetensors", {**lora, **flat})
    with pytest.raises(
        ImportRefused, match=r"'lora_unet_blocks\S+' and 'transformer\.blocks\S+' name the same weights"
    ):
        imported("wan-1.3b", loras=((twice, 1.0),))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_no_weights(
    base: TinyFolder, imported: Import, tmp_path: Path, lora: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """They are quantised, and read without their scales they draw noise."""
    network = weights(base("wan-1.3b") / "transformer")
    file = save(tmp_path / "network.safetensors", {**network, "proj_out.weight": network["proj_out.weight"].to(dtype)})
    with pytest.raises(ImportRefused, match=r"network\.safetensors holds 'proj_out\.weight' in .*: it is quantised"):
        imported("wan-1.3b", network=file)
    key = next(iter(lora))
    file = save(tmp_path / "lora.safetensors", {**lora, key: lora[key].to(dtype)})
    with pytest.raises(ImportRefused, match=rf"lora\.safetensors: '{key}' is of .* quantised"):
        imported("wan-1.3b", loras=((file, 1.0),))


@pytest.mark.parametrize("merged", [False, True])
def test_scaled_text_encoders_are_refused_whether_they_are_copied_or_merged(
    base: TinyFolder, imported: Import, tmp_path: Path, merged: bool
) -> None:
    scaled = Path(shutil.copytree(base("sdxl"), tmp_path / "scaled"))
    file = scaled / "text_encoder" / "model.safetensors"
    state = weights(file.parent)
    query = next(key.removesuffix(".weight") for key in state if key.endswith("q_proj.weight"))
    eight = {**state, f"{query}.weight": state[f"{query}.weight"].to(torch.float8_e4m3fn)}
    save(file, {**eight, f"{query}.scale_weight": torch.ones(1)})
    width = len(state[f"{query}.weight"])
    factors = {"lora_A": torch.ones(2, width), "lora_B": torch.ones(width, 2)}
    te = save(tmp_path / "te.safetensors", {f"text_encoder.{query}.{name}.weight": f for name, f in factors.items()})
    with pytest.raises(ImportRefused, match=r"text_encoder.* is an fp8 file with scales"):
        imported("sdxl", base=str(scaled), loras=((te, 1.0),) if merged else ())


def test_what_is_written_oddly_is_refused_or_taken_in_one_sentence(
    base: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    with pytest.raises(ImportRefused, match=r"--config goes with a single file, and --base .*sdxl is a folder"):
        imported("sdxl", config=tmp_path / "nowhere")
    network = Path(shutil.copytree(base("sdxl") / "unet", tmp_path / "unet"))
    (network / "config.json").unlink()
    index = network / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    with pytest.raises(ImportRefused, match=r"index\.json: field 'weight_map' lists no file"):
        imported("sdxl", network=index)
    several = Path(shutil.copytree(base("sdxl"), tmp_path / "several"))
    config = several / "unet" / "config.json"
    former = json.loads(config.read_text())
    widths = [former["cross_attention_dim"]] * len(former["down_block_types"])
    config.write_text(json.dumps({**former, "cross_attention_dim": widths}))
    imported("sdxl", base=str(several))


@pytest.mark.parametrize("shape", [(), (0, 24)])
def test_a_factor_of_no_rank(imported: Import, tmp_path: Path, lora: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    query = "transformer.blocks.0.attn1.to_q"
    state = {**lora, f"{query}.lora_A.weight": torch.zeros(shape), f"{query}.alpha": torch.tensor(4.0)}
    file = save(tmp_path / "x.safetensors", state)
    with pytest.raises(ImportRefused, match=r"x\.safetensors: '.*to_q\.lora_A\.weight' has the shape .* of no rank"):
        imported("wan-1.3b", loras=((file, 1.0),))


def test_no_match_half_a_match_and_half_a_pair(
    base: TinyFolder, imported: Import, tmp_path: Path, lora: dict[str, Tensor]
) -> None:
    foreign = {
        f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_{part}.weight": torch.ones(4, 4)
        for i in range(9)
        for part in ("down", "up")
    }
    none = save(tmp_path / "flux.safetensors", foreign)
    for allow in (False, True):  # a LoRA of which nothing fits is no LoRA of this base
        with pytest.raises(ImportRefused, match=r"18 of 18 keys find no place: .* and 6 more; it is for another model"):
            imported("wan-1.3b", loras=((none, 1.0),), allow_unmatched=allow)
    first = "transformer.blocks.0.attn1.to_q.lora_A.weight"
    query = "transformer.blocks.0.attn1.to_q"
    without = {key: value for key, value in lora.items() if key != first}
    cases = {
        "half": ({**lora, **foreign}, r"18 of 34 keys .*no such module"),
        "pair": (without, r"1 of 15 keys.*one of two factors is missing"),
        "shape": (
            {**lora, first: torch.ones(4, 48)},
            r"2 of 16 keys.*\[4, 48\] and \[24, 4\] do not fit .* \[24, 24\]",
        ),
        "rank": ({**lora, first: torch.ones(3, 24)}, r"2 of 16 keys.*do not fit"),
        "whole": ({**lora, f"{query}.weight": torch.ones(24, 24)}, r"1 of 17 keys.*part of no LoRA module"),
        "other block": ({**lora, first.replace("blocks.0", "blocks.7"): torch.ones(4, 24)}, r"blocks\.7"),
    }
    for name, (state, message) in cases.items():
        file = save(tmp_path / f"{name}.safetensors", state)
        with pytest.raises(ImportRefused, match=message):
            imported("wan-1.3b", loras=((file, 1.0),))
    done = imported("wan-1.3b", loras=((tmp_path / "half.safetensors", 1.0),), allow_unmatched=True)
    assert list(done.left_out) == [f"half.safetensors: {key}" for key in sorted(foreign)]


def test_values_that_are_not_finite(
    base: TinyFolder, imported: Import, tmp_path: Path, lora: dict[str, Tensor]
) -> None:
    key = "transformer.blocks.1.attn2.to_k.lora_B.weight"
    file = save(tmp_path / "nan.safetensors", {**lora, key: torch.full((24, 4), float("nan"))})
    with pytest.raises(ImportRefused, match=rf"nan\.safetensors: tensor '{key}' holds values that are not finite"):
        imported("wan-1.3b", loras=((file, 1.0),))
    flat = kohya(
        {name.removeprefix("transformer."): value for name, value in lora.items()}, "lora_unet_", (float("inf"),)
    )
    with pytest.raises(ImportRefused, match="alpha' is no finite number"):
        imported("wan-1.3b", loras=((save(tmp_path / "alpha.safetensors", flat), 1.0),))
    with pytest.raises(ImportRefused, match=r"x\.safetensors: tensor .* not finite"):  # finite factors, infinite sum
        imported("wan-1.3b", loras=((save(tmp_path / "x.safetensors", lora), 1e30),), dtype=torch.float16)
    broken = tmp_path / "broken"
    shutil.copytree(base("wan-1.3b"), broken)
    vae = weights(broken / "vae")
    vae["decoder.conv_in.bias"][0] = float("inf")
    save(broken / "vae" / "diffusion_pytorch_model.safetensors", vae)
    with pytest.raises(ImportRefused, match=r"tensor 'decoder\.conv_in\.bias' holds values"):
        imported("wan-1.3b", base=str(broken))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_one_name_in_two_files(base: TinyFolder, tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path / f"model-{number:05}-of-00002.safetensors", {"x": torch.ones(2)})
    with pytest.raises(ImportRefused, match="both hold 'x'"):
        WeightFiles.open(tmp_path)


def test_a_whole_folder_of_the_hub_is_the_student_under_its_own_name_alone(base: TinyFolder, tmp_path: Path) -> None:
    """A local folder may be a copy of it under any name."""
    work = gather(ImportRequest(base=str(base("sdxl")), preset="sdxl-turbo", out=tmp_path / "out"))
    assert not lacks_student(work)
    for name, lacks in (("stabilityai/stable-diffusion-xl-base-1.0", True), ("stabilityai/sdxl-turbo", False)):
        work.base = replace(work.base, name=name, revision="0" * 40)
        assert lacks_student(work) == lacks
