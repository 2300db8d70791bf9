"""A base's own text encoders: transformers' loader only warns of keys that are over or missing; an import refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rmd.backbones.registry import load_checkpoint
from rmd.published.files import ImportRefused
from tests.rmd.published.conftest import TinyFolder, save, weights

Import = Callable[..., Any]
FAMILIES = {
    "sdxl": ("text_encoder_2", "CLIPTextModelWithProjection"),
    "sd3": ("text_encoder_3", "T5EncoderModel"),
    "pixart": ("text_encoder", "T5EncoderModel"),
    "wan-1.3b": ("text_encoder", "UMT5EncoderModel"),
}


def other(base: Path, place: Path, component: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a base with another text encoder."""
    shutil.copytree(base, place)
    (file,) = (place / component).glob("*.safetensors")
    state = weights(place / component)
    change(state)
    save(file, state, {"format": "pt"})
    return place


def lora_of(state: dict[str, Tensor], component: str, path: Path) -> Path:
    """A LoRA of that text encoder, so that it is written anew."""
    key = next(name for name in state if name.endswith(("q_proj.weight", "SelfAttention.q.weight")))
    rows, columns = state[key].shape
    module = f"{component}.{key.removesuffix('.weight')}"
    return save(
        path, {f"{module}.lora_A.weight": torch.ones(2, columns), f"{module}.lora_B.weight": torch.ones(rows, 2)}
    )


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_keys_without_a_place_and_missing_ones_are_refused_by_name(
    base: TinyFolder, imported: Import, tmp_path: Path, name: str, merged: bool
) -> None:
    component, kind = FAMILIES[name]
    state = weights(base(name) / component)
    last = sorted(key for key in state if "norm" in key and key.endswith(".weight"))[-1]
    loras = ((lora_of(state, component, tmp_path / "style.safetensors"), 1.0),) if merged else ()
    changes: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
        "over": (
            lambda state: state.update({"encoder.gate.weight": torch.ones(2)}),
            rf"over/{component} holds 1 keys that {kind} has no place for: encoder\.gate\.weight; .*--allow-unmatched",
        ),
        "missing": (lambda state: state.pop(last), rf"missing/{component} lacks 1 weights of {kind}: .*norm"),
        "shape": (
            lambda state: state.update({last: torch.ones(3)}),
            rf"shape/{component} fits another {kind} than this base has: .*norm.*\[3\] for",
        ),
    }
    for case, (change, message) in changes.items():
        folder = other(base(name), tmp_path / case, component, change)  # type: ignore[arg-type]
        with pytest.raises(ImportRefused, match=message):
            imported(name, base=str(folder), loras=loras)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.importing").exists()
    done = imported(name, base=str(tmp_path / "over"), loras=loras, allow_unmatched=True)
    assert list(done.left_out) == [f"{component}: encoder.gate.weight"]
    assert json.loads((tmp_path / "out" / "cascade.json").read_text())["distillation"]["imported"]["left_out"]
    load_checkpoint(tmp_path / "out", dtype=torch.float32)


def test_old_tables_and_either_way_of_naming_clip_are_taken(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    """As the published SDXL has them: `text_model.` in front of every name, and the table of positions."""
    (own,) = (base("sdxl") / "text_encoder").glob("*.safetensors")
    with safe_open(own, framework="pt") as file:
        wrapped = all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118 - not a mapping

    def rename(state: dict[str, Tensor]) -> None:
        given = {
            name.removeprefix("text_model.") if wrapped else f"text_model.{name}": value
            for name, value in state.items()
        }
        state.clear()
        state.update({**given, "text_model.embeddings.position_ids": torch.arange(77)[None]})

    folder = other(base("sdxl"), tmp_path / "renamed", "text_encoder", rename)
    done = imported("sdxl", base=str(folder))
    assert list(done.left_out) == ["text_encoder: text_model.embeddings.position_ids"]
    found, _ = load_checkpoint(tmp_path / "out", dtype=torch.float32)
    expected, _ = load_checkpoint(imported("sdxl", out=tmp_path / "plain").folder, dtype=torch.float32)
    prompt = ["a red fox"]
    ours, theirs = found.encode_prompts(prompt), expected.encode_prompts(prompt)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    def twice(state: dict[str, Tensor]) -> None:
        name = next(iter(state))
        state["text_model." + name.removeprefix("text_model.")] = state[name]
        state[name.removeprefix("text_model.")] = state[name]

    folder = other(base("sdxl"), tmp_path / "twice", "text_encoder", twice)
    with pytest.raises(ImportRefused, match="name the same weights"):
        imported("sdxl", base=str(folder))


def test_what_a_class_leaves_out_itself_is_said(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    """A whole T5 holds a decoder, which its encoder's class ignores by name."""
    key = "decoder.block.0.layer.0.SelfAttention.q.weight"
    folder = other(
        base("pixart"), tmp_path / "whole", "text_encoder", lambda state: state.update({key: torch.ones(2, 2)})
    )
    assert list(imported("pixart", base=str(folder)).left_out) == [f"text_encoder: {key}"]


@pytest.mark.parametrize("name", ["pixart", "sd3", "wan-1.3b"])
def test_one_weight_under_two_names_with_two_values_is_refused(
    base: TinyFolder, imported: Import, tmp_path: Path, name: str
) -> None:
    """T5's table of words has two names; transformers takes one of them, and says nothing."""
    component, kind = FAMILIES[name]
    shared, tied = "shared.weight", "encoder.embed_tokens.weight"

    def both(state: dict[str, Tensor], by: float = 0.0) -> None:
        table = state[shared if shared in state else tied]
        last = torch.zeros_like(table)
        last[-1, -1] = by
        state.update({shared: table, tied: table + last})

    folder = other(base(name), tmp_path / "same", component, both)
    assert list(imported(name, base=str(folder)).left_out) == []
    folder = other(base(name), tmp_path / "two", component, lambda state: both(state, 0.5))
    match = (
        rf"two/{component}: .*'(shared|encoder\.embed_tokens)\.weight' and .* are one weight of {kind} and hold diff"
    )
    with pytest.raises(ImportRefused, match=match):
        imported(name, base=str(folder))
