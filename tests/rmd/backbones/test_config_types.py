"""A value of another kind than its class takes is refused by file and field; what is published is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rmd.backbones.base import BackboneError
from rmd.backbones.config_types import check_config, check_scheduler, check_tokenizer
from rmd.backbones.configs import CONFIGURED, published_config
from rmd.backbones.registry import get_backbone
from rmd.pipeline import CascadePipeline
from rmd.published.gathering import ImportRequest
from rmd.published.importing import import_model

FILE = Path("model/part/config.json")
Changed = Callable[[str, str, dict[str, Any]], Path]
TinyFolder = Callable[[str], Path]
_PRESETS = {"sdxl": "sdxl-turbo", "wan-1.3b": "wan"}


@pytest.fixture
def changed(tiny_folder: TinyFolder, tmp_path: Path) -> Changed:
    """A tiny folder, without its record of digests, with other fields in one file."""

    def change(name: str, file: str, fields: dict[str, Any]) -> Path:
        folder = Path(shutil.copytree(tiny_folder(name), tmp_path / "odd"))
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **fields}))
        record = json.loads((folder / "cascade.json").read_text())
        record.pop("weights")
        (folder / "cascade.json").write_text(json.dumps(record))
        return folder

    return change


@pytest.mark.parametrize("name", CONFIGURED)
def test_full_size_configurations_are_taken(name: str) -> None:
    kind = get_backbone(name)
    config = published_config(name)
    for component, target in kind.components.items():  # type: ignore[attr-defined]
        check_config(FILE, config[component], target)
    check_scheduler(FILE, config["scheduler"])


@pytest.mark.parametrize(
    ("target", "config"),
    [
        # null for a switch that is off (SDXL's UNet), for no shift, for no statistics; a word for a list of switches.
        ("UNet2DConditionModel", {"upcast_attention": None, "mid_block_only_cross_attention": None}),
        ("UNet2DConditionModel", {"attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10]}),
        # SSD-1B's: one number for a list of equal ones.
        (
            "UNet2DConditionModel",
            {
                "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
                "transformer_layers_per_block": [0, [2, 2], [4, 4]],
            },
        ),
        ("UNet2DConditionModel", {"cross_attention_dim": [2048, 2048], "mid_block_scale_factor": 1, "freq_shift": 0}),
        (
            "AutoencoderKL",
            {"scaling_factor": 0.13025, "shift_factor": None, "latents_mean": None, "force_upcast": True},
        ),
        ("AutoencoderKL", {"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False}),
        ("AutoencoderKL", {"latents_mean": [-1.6, 0.7, -0.1, 1.4], "latents_std": [8.4, 5.9, 4.2, 5.0]}),
        ("AutoencoderTiny", {"shift_factor": None, "latent_shift": 0.5, "latent_magnitude": 3, "scaling_factor": 1}),
        ("AutoencoderKLWan", {"attn_scales": [], "temperal_downsample": [False, True, True], "z_dim": 16}),
        ("PixArtTransformer2DModel", {"interpolation_scale": 0.5, "use_additional_conditions": None}),
        ("PixArtTransformer2DModel", {"caption_channels": 4096, "num_vector_embeds": None, "norm_eps": 1e-06}),
        ("SD3Transformer2DModel", {"dual_attention_layers": [0, 1, 2], "qk_norm": "rms_norm"}),
        ("WanTransformer3DModel", {"image_dim": None, "patch_size": [1, 2, 2], "window_size": [-1, -1]}),
    ],
)
def test_published_values_are_taken(target: str, config: dict[str, Any]) -> None:
    check_config(FILE, {"_class_name": target, "_diffusers_version": "0.19.0.dev0", **config}, f"diffusers:{target}")


def test_published_schedulers_and_tokenizers_are_taken() -> None:
    check_scheduler(FILE, {"_class_name": "PNDMScheduler", "beta_end": 0.012, "trained_betas": None, "clip_sample": 0})
    check_scheduler(FILE, {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"})
    check_scheduler(FILE, {"_class_name": "SomebodysScheduler", "beta_start": 0, "shift": "any"})
    for length in (77, 512, 1000000000000000019884624838656, 1e30, None):
        check_tokenizer(FILE, {"tokenizer_class": "T5TokenizerFast", "model_max_length": length, "extra_ids": 100})
    check_tokenizer(FILE, {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "unk_token": {"content": "<u>"}})
    check_tokenizer(FILE, {"tokenizer_class": "BertTokenizer", "strip_accents": None, "do_lower_case": False})
    check_tokenizer(FILE, {})


_WRONG: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("sdxl", "vae/config.json", {"scaling_factor": "x"}, "a number, not 'x'"),
    ("sdxl", "vae/config.json", {"scaling_factor": None}, "a number, not null"),
    ("sdxl", "vae/config.json", {"scaling_factor": True}, "a number, not True"),
    ("sdxl", "vae/config.json", {"scaling_factor": [0.13]}, r"a number, not \[0.13\]"),
    ("sdxl", "vae/config.json", {"scaling_factor": float("nan")}, "finite, not nan"),
    ("sdxl", "vae/config.json", {"scaling_factor": -0.13}, "above 0, not -0.13"),
    ("sdxl", "vae/config.json", {"scaling_factor": 0}, "above 0, not 0"),
    ("sdxl", "vae/config.json", {"shift_factor": "x"}, "a number or null, not 'x'"),
    ("sdxl", "vae/config.json", {"force_upcast": "no"}, "true or false, not 'no'"),
    ("sdxl", "unet/config.json", {"norm_eps": -1e-5}, "0 or more, not -1e-05"),
    ("sdxl", "unet/config.json", {"flip_sin_to_cos": "false"}, "true or false, not 'false'"),
    (
        "sdxl",
        "unet/config.json",
        {"reverse_transformer_layers_per_block": [[1], "1"]},
        r"a list, each of it a list, each of it a whole number or null, not \[\[1\], '1'\]",
    ),
    ("sdxl", "unet/config.json", {"mid_block_scale_factor": 0}, "above 0, not 0"),
    ("sdxl", "unet/config.json", {"resnet_out_scale_factor": 0.0}, "above 0, not 0.0"),
    ("sdxl", "unet/config.json", {"norm_num_groups": 8.0}, "a whole number or null, not 8.0"),
    ("sdxl", "text_encoder/config.json", {"layer_norm_eps": float("inf")}, "finite, not inf"),
    ("sdxl", "text_encoder/config.json", {"num_hidden_layers": "2"}, "a whole number, not '2'"),
    ("sdxl", "text_encoder_2/config.json", {"layer_norm_eps": None}, "a number, not null"),
    ("sdxl", "scheduler/scheduler_config.json", {"beta_start": "x"}, "a number, not 'x'"),
    ("sdxl", "scheduler/scheduler_config.json", {"beta_end": float("nan")}, "finite, not nan"),
    ("sdxl", "model_index.json", {"force_zeros_for_empty_prompt": "no"}, "true or false, not 'no'"),
    ("sdxl", "tokenizer/tokenizer_config.json", {"model_max_length": "x"}, "a number or null, not 'x'"),
    ("sdxl", "tokenizer/tokenizer_config.json", {"model_max_length": [77]}, r"a number or null, not \[77\]"),
    ("sdxl", "tokenizer/tokenizer_config.json", {"model_max_length": -1}, "0 or more, not -1"),
    ("wan-1.3b", "vae/config.json", {"latents_std": [1.0, 0.0]}, r"above 0, not \[1.0, 0.0\]"),
    ("wan-1.3b", "vae/config.json", {"latents_mean": [0.0]}, r"16 numbers, one a channel, not 1 of them"),
    ("wan-1.3b", "vae/config.json", {"latents_mean": 0.5}, "a list, each of it a number, not 0.5"),
    ("wan-1.3b", "tokenizer/tokenizer_config.json", {"extra_ids": "x"}, "a whole number, not 'x'"),
)


@pytest.mark.parametrize(("name", "file", "fields", "message"), _WRONG)
def test_a_value_of_another_kind_is_refused_by_file_and_field(
    changed: Changed, tmp_path: Path, name: str, file: str, fields: dict[str, Any], message: str
) -> None:
    folder = changed(name, file, fields)
    expected = rf"{file}, field '{next(iter(fields))}': must be {message}; put it right, or copy the file again"
    told: list[str] = []
    request = ImportRequest(base=str(folder), preset=_PRESETS[name], backbone=name, out=tmp_path / "out")
    with pytest.raises(BackboneError, match=expected):
        import_model(request, progress=lambda what, _done, _total: told.append(what))
    assert told == [] and not (tmp_path / "out").exists()
    for weights in (True, False):  # serving eager, and planning engines
        with pytest.raises(BackboneError, match=expected):
            get_backbone(name).load(folder, dtype=torch.float32, weights=weights)
    with pytest.raises(BackboneError, match=expected):
        CascadePipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("tokenizer/tokenizer_config.json", {"pad_token": None}, "no tokenizer could be read from .*padding token"),
        ("tokenizer/tokenizer_config.json", {"unk_token": [3]}, "no tokenizer could be read from .*unk_token"),
        ("vae/config.json", {"block_out_channels": [30, 30]}, "divisible"),
        ("text_encoder/config.json", {"hidden_act": "x"}, "CLIPTextModel.*x"),
    ],
)
def test_what_its_class_itself_refuses_is_told_in_a_sentence(
    changed: Changed, file: str, fields: dict[str, Any], message: str
) -> None:
    folder = changed("sdxl", file, fields)
    for weights in (True, False):
        with pytest.raises(BackboneError, match=message):
            get_backbone("sdxl").load(folder, dtype=torch.float32, weights=weights)


def test_a_small_decoder_and_a_students_own_configuration_too(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    unet = Path(shutil.copytree(tiny_folder("sdxl") / "unet", tmp_path / "unet"))
    content = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps({**content, "norm_eps": True}))
    request = ImportRequest(base=str(tiny_folder("sdxl")), preset="sdxl-turbo", out=tmp_path / "out", network=unet)
    with pytest.raises(BackboneError, match=r"unet/config\.json, field 'norm_eps': must be a number, not True"):
        import_model(request)
