"""At which strength a LoRA is merged where nobody asks for one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors.torch import load_file

from rmd.published.exporting import _licence
from rmd.published.files import ImportRefused
from tests.rmd.published.conftest import TinyFolder, assert_equal_weights, random_lora, save, weights
from tests.rmd.published.test_lora_merge import ATTENTION, fused

Import = Callable[..., Any]


PRESET = "hyper-sd3-8-cfg"
PUBLISHED = "Hyper-SD3-8steps-CFG-lora.safetensors"


def lora(base: Path, place: Path, seed: int = 0) -> Path:
    """A LoRA of a tiny SD3, as diffusers writes it."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}
    state = random_lora(SD3Transformer2DModel.from_pretrained(base / "transformer"), LoraConfig(**settings), seed)
    StableDiffusion3Pipeline.save_lora_weights(
        place.parent,
        weight_name=place.name,
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=settings,
    )
    return place


def told(done: Any) -> list[tuple[float, str]]:
    return [(lora["strength"], lora["strength_from"]) for lora in done.record["imported"]["loras"]]


def test_a_students_lora_without_a_strength_takes_its_presets(
    base: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    """Hyper-SD's card merges its SD3 LoRAs at 0.125, by diffusers' `fuse_lora(lora_scale=0.125)`."""
    file = lora(base("sd3"), tmp_path / PUBLISHED)
    oracle = fused(StableDiffusion3Pipeline, base("sd3"), [(file, 0.125)], ["transformer"])["transformer"]

    done = imported("sd3", loras=((file, None),), preset=PRESET)
    (recorded,) = done.record["imported"]["loras"]
    assert (recorded["strength"], recorded["strength_from"]) == (0.125, "preset")
    before = weights(base("sd3") / "transformer")
    assert_equal_weights(weights(tmp_path / "out" / "transformer"), oracle, before)
    stored = json.loads((tmp_path / "out" / "cascade.json").read_text())
    assert stored["distillation"]["imported"]["loras"] == [recorded]
    assert done.record["imported"]["student"] == {"source": "ByteDance/Hyper-SD", "licence": None}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "which is of `ByteDance/Hyper-SD` (licence, as it was read: not confirmed)" in card
    assert "LoRA at 0.125, as hyper-sd3-8-cfg is published (factors 0.25)" in card

    assert told(imported("sd3", loras=((file, 1.0),), preset=PRESET)) == [(1.0, "option")]
    assert "LoRA at 1, while hyper-sd3-8-cfg is published at 0.125" in (tmp_path / "out" / "README.md").read_text()


def test_a_style_on_a_student_is_merged_at_1(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    """It was merged at the student's 0.125."""
    student, style = lora(base("sd3"), tmp_path / PUBLISHED), lora(base("sd3"), tmp_path / "style.safetensors", 7)
    options: dict[str, Any] = {"preset": PRESET}
    done = imported("sd3", loras=((style, None), (student, None)), **options)
    assert told(done) == [(1.0, "default"), (0.125, "preset")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LoRA at 1, since it is not hyper-sd3-8-cfg's own (factors 2)" in card

    on = str(imported("sd3", loras=((student, None),), out=tmp_path / "student", **options).folder)
    said: list[str] = []
    imported("sd3", base=on, say=said.append, **options)
    assert said == [], "a base that is the student already lacks none"
    done = imported("sd3", base=on, loras=((style, None),), **options)
    assert told(done) == [(1.0, "default")] and done.record["imported"]["student"]
    oracle = fused(StableDiffusion3Pipeline, Path(on), [(style, 1.0)], ["transformer"])["transformer"]
    assert_equal_weights(weights(tmp_path / "out" / "transformer"), oracle, weights(Path(on) / "transformer"))
    assert told(imported("sd3", base=on, loras=((style, 0.3),), **options)) == [(0.3, "option")]


def test_whose_lora_it_is_must_be_said_where_it_cannot_be_known(
    base: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    student, style = lora(base("sd3"), tmp_path / PUBLISHED), lora(base("sd3"), tmp_path / "style.safetensors", 7)
    never = imported("sd3", preset=PRESET, out=tmp_path / "never").folder  # nothing made that one the student
    for more in (
        {"loras": ((style, None),)},
        {"loras": ((style, None),), "base": str(never)},
        {"loras": ((student, None),), "network": tmp_path / "none"},
        {"loras": ((student, 1.0), (style, None)), "network": tmp_path / "none"},
    ):
        with pytest.raises(
            ImportRefused, match=rf"published with its LoRA {PUBLISHED} at 0\.125, .* FILE:0\.125 for the"
        ):
            imported("sd3", preset=PRESET, **more)
    done = imported("sd3", loras=((student, None), (style, 0.5)), preset="sd3")
    assert told(done) == [(1.0, "default"), (0.5, "option")]


def test_one_lora_given_twice_is_refused(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    """It was added twice, without a word."""
    file = lora(base("sd3"), tmp_path / "style.safetensors")
    copy = Path(shutil.copy(file, tmp_path / "copy.safetensors"))
    for loras, way in (
        (((file, None), (file, None)), "style.safetensors:2"),
        (((file, 0.5), (copy, 0.25)), "copy.safetensors:0.75"),
    ):
        with pytest.raises(ImportRefused, match=rf"the same weights as .*style\.safetensors.*give it once.*{way}"):
            imported("sd3", loras=loras)
    once = imported("sd3", loras=((file, None),), out=tmp_path / "once").folder
    with pytest.raises(ImportRefused, match=r"copy\.safetensors is in .*once already, .*leave it out, or say how much"):
        imported("sd3", base=str(once), loras=((copy, None),))
    assert told(imported("sd3", base=str(once), loras=((copy, 0.25),))) == [(0.25, "option")]


def test_what_a_base_was_made_of_stays_in_the_record(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    """An import of an import told of its last LoRA alone, and took the first one a second time, without a word."""
    first = lora(base("sd3"), tmp_path / "first.safetensors", seed=1)
    save(first, load_file(first), {"modelspec.license": "cc-by-nc-4.0"})
    second = lora(base("sd3"), tmp_path / "second.safetensors", seed=2)
    once = imported("sd3", loras=((first, None),), out=tmp_path / "once")
    twice = imported("sd3", base=str(once.folder), loras=((second, 0.5),), out=tmp_path / "twice")
    thrice = imported("sd3", base=str(twice.folder), out=tmp_path / "thrice")

    of = thrice.record["imported"]["base"]["distillation"]
    assert of == json.loads((twice.folder / "cascade.json").read_text())["distillation"]
    assert of["imported"]["base"]["distillation"] == once.record
    card = (thrice.folder / "README.md").read_text()
    assert "| in twice: LoRA at 0.5 (factors 1) | second.safetensors | not said in the file |" in card
    assert "| in once: LoRA at 1 (factors 1) | first.safetensors | cc-by-nc-4.0 | first.safetensors `" in card
    assert _licence(thrice.folder) == "cc-by-nc-4.0"  # which a LoRA of it is under, too
    with pytest.raises(ImportRefused, match=r"first\.safetensors is in .*thrice already"):
        imported("sd3", base=str(thrice.folder), loras=((first, None),))


def test_a_checkpoint_beside_the_weights_is_no_base(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    """One that lends a single file its configuration, or gets another network, made that one the student."""
    student = lora(base("sd3"), tmp_path / PUBLISHED)
    held = imported("sd3", loras=((student, None),), preset=PRESET, out=tmp_path / "held").folder
    single = base("sd3") / "transformer" / "diffusion_pytorch_model.safetensors"
    said: list[str] = []
    done = imported("sd3", base=str(single), config=held, preset=PRESET, say=said.append)
    assert len(said) == 1 and "nothing is merged" in said[0] and "ByteDance/Hyper-SD" in said[0]
    assert "student" not in done.record["imported"]
    assert "distillation" not in done.record["imported"]["base"]
    expected = weights(held / "transformer")
    for options in ({"base": str(single), "config": held}, {"base": str(held), "network": single}):
        strength = None if "config" in options else 0.125
        folder = imported("sd3", loras=((student, strength),), preset=PRESET, **options).folder
        found = weights(folder / "transformer")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    # Of the preset's strength where it is 1, it need not be given; the LoRA is in what the network replaces.
    once = imported("sd3", loras=((student, None),), out=tmp_path / "once").folder
    assert told(imported("sd3", base=str(once), network=single, loras=((student, None),))) == [(1.0, "default")]
