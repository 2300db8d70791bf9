"""A preset that a folder's files contradict is refused, and one that they do not is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rmd.backbones.configs import published_config
from rmd.backbones.registry import get_backbone
from rmd.backbones.student_fit import FolderFacts, check_student, contradictions, fitting_family, read_facts
from rmd.backbones.tiny import TINY_BACKBONES, write_tiny_folder
from rmd.presets import PRESETS, preset_backbone
from rmd.students import STEP_LISTS


def published(name: str, **denoiser: Any) -> FolderFacts:
    config = published_config(name, text=False)
    component = get_backbone(name).denoiser_folder  # type: ignore[attr-defined]
    return FolderFacts(config["model_index"], {**config[component], **denoiser}, config["scheduler"])


SD3_MEDIUM = {"dual_attention_layers": ()}
SD3_LARGE = {"num_layers": 38, "num_attention_heads": 38, "dual_attention_layers": ()}
BASES = {
    "sdxl": published("sdxl"),
    "pixart-1024": published("pixart"),
    "pixart-512": published("pixart", sample_size=64),
    "sd3-medium": published("sd3", **SD3_MEDIUM),
    "sd3.5-medium": published("sd3"),
    "sd3.5-large": published("sd3", **SD3_LARGE),
    "wan-1.3b": published("wan-1.3b"),
    "wan-14b": published("wan-14b"),
}


@pytest.mark.parametrize("base", BASES)
def test_a_base_takes_its_own_students_and_no_others(base: str) -> None:
    for name, entry in STEP_LISTS.items():
        facts = BASES[base]
        if entry.prediction == "sample":
            facts = replace(facts, scheduler={**facts.scheduler, "prediction_type": "sample"})
        of_family = get_backbone(entry.backbone).profile == get_backbone(_backbone(base)).profile
        fits = entry.base == base or (entry.base is None and of_family)
        assert (not contradictions(name, facts)) == fits, name


def _backbone(base: str) -> str:
    return base if base.startswith("wan") else base.split("-")[0].removesuffix(".5")


@pytest.mark.parametrize("name", TINY_BACKBONES)
def test_a_tiny_network_contradicts_nothing_of_its_family(name: str, tiny_folder: Any) -> None:
    facts = read_facts(tiny_folder(name), next(p for p in PRESETS if preset_backbone(p) == _any(name)))
    assert facts.weight_names and facts.denoiser and facts.index
    ours = [p for p in PRESETS if preset_backbone(p) == name]
    for preset in ours:
        if preset not in ("sdxl-lightning-1", "pixart-dmd"):  # the tiny PixArt is told its size, as the 1024 one is
            check_student(preset, tiny_folder(name))


def _any(name: str) -> str:
    return {"wan-1.3b": "wan-14b"}.get(name, name)


@pytest.mark.parametrize(
    ("preset", "facts", "message"),
    [
        ("lcm-sdxl", published("sdxl", time_cond_proj_dim=256), "takes its guidance as an input"),
        ("sdxl-turbo", published("sdxl", in_channels=9), "works on 4 channels, and the network takes 9"),
        ("dmd2-sdxl", published("sdxl", cross_attention_dim=768), "distilled from sdxl, and the network is sd1's"),
        ("sd3.5-large-turbo", published("sd3"), "distilled from sd3.5-large, and the network is sd3.5-medium's"),
        ("swd-sd3", published("sdxl"), "needs a SD3Transformer2DModel (transformer/), and model_index.json names none"),
        ("lightx2v-wan-14b", published("wan-14b", in_channels=36), "works on 16 channels"),
        (
            "sdxl-lightning",
            replace(published("sdxl"), scheduler={"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
            "zero terminal SNR",
        ),
        ("sdxl", replace(published("sdxl"), scheduler={"prediction_type": "v_prediction"}), "'v_prediction'"),
        (
            "rcm-wan-1.3b",
            replace(published("wan-1.3b"), weight_names=frozenset({"blocks.0.attn1.to_gate_compress.weight"})),
            "another attention",
        ),
        (
            "rcm-wan-14b",
            replace(published("wan-14b"), index={
                "transformer": ["diffusers", "WanTransformer3DModel"],
                "transformer_2": ["diffusers", "WanTransformer3DModel"],
            }),
            "names two",
        ),
    ],
)  # fmt: skip
def test_what_contradicts_is_said(preset: str, facts: FolderFacts, message: str) -> None:
    assert any(message in reason for reason in contradictions(preset, facts))


def test_everything_that_speaks_against_a_preset_is_in_one_error(tmp_path: Any) -> None:
    folder = write_tiny_folder("wan-1.3b", tmp_path / "gated")
    (file,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(file)
    weights["blocks.0.attn1.to_gate_compress.weight"] = weights["blocks.0.attn1.to_q.weight"].clone()
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"'rcm-wan-1.3b' does not fit .*gated: the network has another attention"):
        check_student("rcm-wan-1.3b", folder)
    with pytest.raises(ValueError, match="'fastwan' is not supported"):
        check_student("fastwan", folder)


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-14b"])
def test_a_preset_of_either_size_is_of_the_network_that_is_there(name: str) -> None:
    found = published(name).denoiser
    for preset in ("rmd-wan", "rmd-wan-shift5", "wan"):
        assert fitting_family(preset, None, found) is fitting_family(preset, name, found) is get_backbone(name)
    other = {"wan-1.3b": "wan-14b", "wan-14b": "wan-1.3b"}[name]
    with pytest.raises(ValueError, match=rf"--backbone {other}: the network is {name}'s; .* say --backbone {name}"):
        fitting_family("rmd-wan", other, found)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_network_of_no_known_base_is_of_the_presets_backbone(preset: str) -> None:
    assert fitting_family(preset, None, {}) is get_backbone(preset_backbone(preset))
