"""Checkpoint folders: what is read, what is refused, and what the refusals say."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rmd.backbones.base import BackboneError
from rmd.backbones.folder import DiffusersFolder
from rmd.backbones.registry import load_checkpoint
from rmd.backbones.tiny import write_tiny_folder
from rmd.cascade_file import write_cascade_json
from rmd.checkpoint import CheckpointFolder, TeacherSpec
from rmd.presets import preset
from rmd.weight_files import file_digest

SPLITS = ("2+2", "1+3", "0+4", "3+1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "student"
    for component in ("transformer", "vae"):
        (path / component).mkdir(parents=True)
        weights = {"weight": torch.randn(4, 4), "bias": torch.randn(4)}
        save_file(weights, path / component / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    write_cascade_json(
        path,
        backbone="embedded",
        cascades={split: preset("embedded", schedule=split) for split in SPLITS},
        default="2+2",
        teacher=TeacherSpec(steps=50, guidance_scale=3.0, folder="../teacher"),
        distillation={"method": "rmd", "iterations": 1000},
    )
    return path


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "cascade.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_what_is_written_is_read(folder: Path) -> None:
    checkpoint = CheckpointFolder.read(folder)
    assert checkpoint.backbone_name == "embedded"
    assert checkpoint.default == "2+2"
    assert checkpoint.cascades == {split: preset("embedded", schedule=split) for split in SPLITS}
    assert checkpoint.default_cascade == preset("embedded")
    assert checkpoint.teacher == TeacherSpec(50, 3.0, 1.0, "../teacher")
    assert checkpoint.teacher_path == folder / "../teacher"
    assert checkpoint.distillation == {"method": "rmd", "iterations": 1000}
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_failed_write_leaves_the_old_file(folder: Path) -> None:
    before = (folder / "cascade.json").read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_cascade_json(
            folder,
            backbone="embedded",
            cascades={"2+2": preset("embedded")},
            default="2+2",
            distillation={"loss": float("nan")},
        )
    with pytest.raises(ValueError, match="not one of the schedules 2"):
        write_cascade_json(folder, backbone="embedded", cascades={"2+2": preset("embedded")}, default="1+3")
    assert (folder / "cascade.json").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["cascade.json", "transformer", "vae"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("format"), "'format' is missing"),
        (lambda d: d.update(format=2), "'format'"),
        (lambda d: d.pop("backbone"), "'backbone' is missing"),
        (lambda d: d.update(backbone=3), "'backbone'"),
        (lambda d: d.pop("default"), "'default' is missing"),
        (lambda d: d.update(default="9+9"), "'default'"),
        (lambda d: d.pop("schedules"), "'schedules' is missing"),
        (lambda d: d.update(schedules={}), "'schedules'"),
        (lambda d: d.update(schedules=[]), "'schedules'"),
        (lambda d: d["schedules"]["1+3"].pop("steps"), r"schedules\['1\+3'\].*'steps' is missing"),
        (lambda d: d["schedules"]["2+2"]["steps"][1].update(timestep="857"), r"'steps\[1\].timestep'"),
        (lambda d: d["teacher"].pop("steps"), "'teacher.steps' is missing"),
        (lambda d: d["teacher"].update(steps=0), "'teacher.steps'"),
        (lambda d: d["teacher"].update(steps=10**8), "'teacher.steps': must be from 1 to 1000"),
        (lambda d: d["teacher"].update(steps=900, flow_shift=9.0), "'teacher': 900 steps under flow shift 9.0 do not"),
        (lambda d: d["teacher"].update(flow_shift=0), "'teacher.flow_shift': must be above 0"),
        (lambda d: d["teacher"].update(guidance_scale=-1), "'teacher.guidance_scale': must not be negative"),
        (lambda d: d["teacher"].update(flow_shift=1e-320), "'teacher.flow_shift': must be above 0"),
        (lambda d: d["teacher"].update(guidance_scale=1e308), "'teacher.guidance_scale': must not be .* above 1000"),
        (lambda d: d["teacher"].update(guidance_scale=10**400), "'teacher.guidance_scale': the number is too large"),
        (lambda d: d["schedules"]["2+2"].update(initial_noise_scale=1e300), "'initial_noise_scale': .* at most 1000"),
        (lambda d: d["schedules"]["2+2"].update(flow_shift=10**400), "'flow_shift': the number is too large"),
        (
            lambda d: d["schedules"].update({"\ud800": d["schedules"]["1+3"]}),
            "'schedules': the name .* not valid Unicode",
        ),
        (lambda d: d["schedules"].update({"a\nb": d["schedules"]["1+3"]}), "'schedules': the name .* not printable"),
        (
            lambda d: d["schedules"].update(teacher=d["schedules"]["1+3"]),
            "'schedules': 'teacher' is what the teacher's",
        ),
        (lambda d: d["teacher"].update(guidance_scale=None), "'teacher.guidance_scale'"),
        (lambda d: d["teacher"].update(folder=1), "'teacher.folder'"),
        (lambda d: d.update(teacher=[]), "'teacher'"),
        (lambda d: d.update(distillation="rmd"), "'distillation'"),
    ],
)
def test_wrong_fields_are_named_with_the_file(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=f"cascade.json: .*{message}"):
        CheckpointFolder.read(folder)


def test_broken_json_names_the_place(folder: Path) -> None:
    (folder / "cascade.json").write_text('{"format": 1,\n "backbone" "embedded"}')
    with pytest.raises(ValueError, match=r"cascade.json: line 2, column 13"):
        CheckpointFolder.read(folder)
    (folder / "cascade.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        CheckpointFolder.read(folder)
    (folder / "cascade.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"cascade\.json: nested too deeply"):
        CheckpointFolder.read(folder)
    (folder / "cascade.json").write_text("[]")
    with pytest.raises(ValueError, match="must be an object"):
        CheckpointFolder.read(folder)
    (folder / "cascade.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cascade\.json does not exist"):
        CheckpointFolder.read(folder)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        CheckpointFolder.read(folder / "nowhere")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "a/b/model.PT", "x.pth", "model.ckpt", ".hidden/scaler.pkl", "vae/rng.pickle"]
)
def test_pickles_are_refused_anywhere(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{path.name} is a pickled file.*safetensors"):
        CheckpointFolder.read(folder)


def test_pickles_behind_a_link_are_refused(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights.pt").write_bytes(b"")
    (folder / "text_encoder").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    with pytest.raises(ValueError, match=r"weights.pt is a pickled file"):
        CheckpointFolder.read(folder)
    (elsewhere / "weights.pt").unlink()
    assert CheckpointFolder.read(folder).default == "2+2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda b: b[:-1], "is cut short: .* bytes are there; fetch or copy it again"),
        (lambda b: b[:20], "cut short inside its header"),
        (lambda b: b"", "is not a safetensors file"),
        (lambda b: b[:5], "is not a safetensors file"),
        (lambda b: b + b"\0", "1 bytes too many"),
        (lambda b: b"\xff" * 64, "is not a safetensors file"),
        (lambda b: (2).to_bytes(8, "little") + b"[]", "is not a safetensors file"),
        (lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
    ],
)
def test_broken_weights_are_refused(folder: Path, content: Callable[[bytes], bytes], message: str) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        CheckpointFolder.read(folder)
    assert str(path) in str(caught.value)


def test_altered_weights_are_refused_by_their_digest(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"vae/diffusion.*altered or damaged; copy it again, or, .* remove that field"):
        CheckpointFolder.read(folder)
    edit(folder, lambda data: data.pop("weights"))
    CheckpointFolder.read(folder)
    edit(folder, lambda data: data.update(weights={"unet/model.safetensors": "0"}))
    with pytest.raises(
        FileNotFoundError, match=r"unet/model\.safetensors is recorded in cascade\.json and is not there"
    ):
        CheckpointFolder.read(folder)
    edit(folder, lambda data: data.update(weights={"w" * 5000: "0"}))
    with pytest.raises(FileNotFoundError, match=r"^w{200}\.\.\. is recorded"):
        CheckpointFolder.read(folder)


def test_a_checkpoint_is_whole_or_refused(tmp_path: Path) -> None:
    """Weights, configurations and tokenizers: each is recorded, and missed or noticed when it was changed."""
    whole = write_tiny_folder("embedded", tmp_path / "whole")
    recorded = json.loads((whole / "cascade.json").read_text())["weights"]
    for name in recorded:
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        (copy / name).write_bytes((copy / name).read_bytes() + b" ")
        with pytest.raises(ValueError, match=f"{re.escape(name)} (is not the file that|has 1 bytes too many)"):
            CheckpointFolder.read(copy)
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{re.escape(name)} is recorded"):
            CheckpointFolder.read(copy)
        shutil.rmtree(copy)
    assert {"model_index.json", "tokenizer/tokenizer.json", "vae/config.json", "scheduler/scheduler_config.json"} < set(
        recorded
    )
    # README and the like may be edited, and older folders, which record the safetensors files alone, go on being read.
    (whole / "README.md").write_text("mine")
    (whole / "notes.json").write_text("{}")
    CheckpointFolder.read(whole)
    edit(whole, lambda d: d.update(weights={k: v for k, v in d["weights"].items() if k.endswith(".safetensors")}))
    (whole / "vae" / "config.json").write_bytes((whole / "vae" / "config.json").read_bytes() + b" ")
    CheckpointFolder.read(whole)
    # But a tokenizer without its words is refused there too.
    (whole / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(BackboneError, match=r"tokenizer has no vocabulary \(tokenizer\.json, "):
        load_checkpoint(whole, dtype=torch.float32)


def test_a_file_that_was_added_beside_recorded_ones_is_refused(tmp_path: Path) -> None:
    """A tokenizer's further settings change what is drawn as a changed file does."""
    whole = write_tiny_folder("embedded", tmp_path / "whole")
    (whole / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": "a"}')
    with pytest.raises(ValueError, match=r"special_tokens_map\.json is not recorded in cascade\.json"):
        CheckpointFolder.read(whole)
    edit(whole, lambda data: data.pop("weights"))
    CheckpointFolder.read(whole)


def test_the_named_decoder_is_the_recorded_one(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(2)}, small / "diffusion_pytorch_model.safetensors")
    folder = write_tiny_folder("embedded", tmp_path / "whole")
    named = {"backbone": "embedded", "cascades": {"2+2": preset("embedded")}, "default": "2+2"}
    write_cascade_json(folder, **named, decoder="../small")  # type: ignore[arg-type]
    assert CheckpointFolder.read(folder).with_decoder(None).decoder_path == folder / "../small"
    (small / "config.json").write_text('{"act_fn": "gelu"}')
    with pytest.raises(ValueError, match=r"config\.json is not the file that .* \(field 'decoder_weights'\)"):
        CheckpointFolder.read(folder).with_decoder(None)
    assert CheckpointFolder.read(folder).with_decoder("full").decoder_path is None


def test_a_teacher_is_whole_or_refused(tmp_path: Path) -> None:
    teacher = write_tiny_folder("embedded", tmp_path / "teacher")
    folder = write_tiny_folder("embedded", tmp_path / "student")
    edit(folder, lambda data: data["teacher"].update(folder="../teacher"))
    CheckpointFolder.read(folder).check_teacher()
    path = teacher / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=r"teacher/vae/.* altered or damaged"):
        CheckpointFolder.read(folder).check_teacher()


def test_missing_weights_are_refused(folder: Path) -> None:
    index = {"weight_map": {"weight": "model-00001-of-00002.safetensors"}}
    (folder / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"lists model-00001-of-00002\.safetensors"):
        CheckpointFolder.read(folder)
    shutil.rmtree(folder / "transformer")
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match="no safetensors weights"):
        CheckpointFolder.read(folder)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors.index.fp16.json"])
@pytest.mark.parametrize("part", ["part.data", "../model.safetensors"])
def test_an_index_of_other_files_is_refused(folder: Path, name: str, part: str) -> None:
    """Loaders read a part by its suffix: one that is no safetensors file would be unpickled."""
    (folder / "transformer" / "part.data").write_bytes(b"")
    (folder / "transformer" / name).write_text(json.dumps({"weight_map": {"weight": part}}))
    with pytest.raises(ValueError, match=r"lists '.*'; only safetensors files beside it are read"):
        CheckpointFolder.read(folder)
    with pytest.raises(BackboneError, match="only safetensors files beside it are read"):
        DiffusersFolder(folder, {}).load(
            "transformer", "diffusers:SD3Transformer2DModel", torch.float32, torch.device("cpu"), True
        )


def test_digests(folder: Path) -> None:
    checkpoint = CheckpointFolder.read(folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    first = hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.digest("transformer") == checkpoint.digest("denoiser") == first
    assert checkpoint.digest("decoder") == checkpoint.digest("vae") != first
    with pytest.raises(FileNotFoundError, match="text_encoder"):
        checkpoint.digest("text_encoder")
    shutil.copy(path, path.with_name("second.safetensors"))
    assert checkpoint.digest("transformer") != first


def test_digests_follow_the_file_and_are_cached(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    first = file_digest(path)
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_digest(path) == first  # same size and time: the remembered digest, without reading
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert file_digest(path) == hashlib.sha256(content).hexdigest()


def test_the_fingerprint_is_of_what_decides_a_picture(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    save_file({"weight": torch.zeros(2)}, small / "diffusion_pytorch_model.safetensors")
    folder = write_tiny_folder("embedded", tmp_path / "whole")
    edit(folder, lambda data: data.pop("weights"))
    (folder / "README.md").write_text("mine")

    def fingerprint(decoder: Path | None = None) -> str:
        return CheckpointFolder.read(folder).with_decoder(decoder).fingerprint()

    seen = [fingerprint()]
    copy = shutil.copytree(folder, tmp_path / "copy")
    (folder / "README.md").write_text("mine still")
    assert CheckpointFolder.read(copy).fingerprint() == fingerprint() == seen[0], "wherever it lies"
    seen.append(fingerprint(small))
    save_file({"weight": torch.ones(2)}, small / "diffusion_pytorch_model.safetensors")
    os.utime(small / "diffusion_pytorch_model.safetensors", ns=(1, 1))
    seen.append(fingerprint(small))
    for name in ("transformer/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json", "vae/config.json"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept[:-1] + b"\x7f" if name.endswith(".safetensors") else kept + b" ")
        os.utime(folder / name, ns=(1, 1))  # another time, however quick this is
        seen.append(fingerprint())
        (folder / name).write_bytes(kept)
    edit(folder, lambda data: data["schedules"].update(again=data["schedules"]["2+2"]))
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen) == 7
