"""The folder that an import writes: who may read it, what it may replace, and what a stopped run leaves."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rmd.published.place import check_out, replace_folder, whole_folder
from tests.rmd.published.conftest import TinyFolder, closed_to_others

Import = Callable[..., Any]
ROOT = Path(__file__).parents[3]


def test_a_services_own_user_may_read_an_import(imported: Import, tmp_path: Path) -> None:
    imported("sdxl")
    assert closed_to_others(tmp_path / "out") == []


def test_what_a_killed_run_has_half_written_goes(tmp_path: Path) -> None:
    """The kernel kills the run at its file's 20,000th byte, so that the moment is sure."""
    script = f"""
import resource, signal
from pathlib import Path
import torch
from safetensors.torch import save_file
from rmd.published.place import finished_file, whole_folder
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
with whole_folder(Path({str(tmp_path / "out")!r}), "these files") as scratch:
    (scratch / "unet").mkdir()
    save_file({{"x": torch.ones(10)}}, scratch / "unet" / "first.safetensors")
    (scratch / "unet" / "second.safetensors.partial").touch()
    with finished_file(scratch / "unet" / "second.safetensors") as partial:
        save_file({{"x": torch.ones(10_000)}}, partial)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    unet = tmp_path / ".out.importing" / "unet"
    left = {path.name for path in unet.iterdir()} - {"first.safetensors", "second.safetensors.partial"}
    assert len(left) == 1 and left.pop().startswith(".tmp")  # safetensors' own
    (unet / ".cascade-half").touch()
    with whole_folder(tmp_path / "out", "these files"):
        pass
    assert [path.name for path in (tmp_path / "out" / "unet").iterdir()] == ["first.safetensors"]


def test_what_is_no_checkpoints_is_never_replaced(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    imported("pixart")
    check_out(tmp_path / "out", base("pixart"))
    for number, name in enumerate(("thesis.txt", "vae/notes.md", "transformer/run/state.safetensors", "train")):
        out = Path(shutil.copytree(tmp_path / "out", tmp_path / f"out-{number}"))
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine") if "." in name else (out / name).mkdir()
        with pytest.raises(ValueError, match=f"holds {name} too, which is no part of a checkpoint and would be lost"):
            imported("pixart", out=out)
        assert (out / name).exists()


def test_a_former_checkpoints_copies_of_a_teachers_files_are_no_loss(base: TinyFolder, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(base("pixart"), tmp_path / "teacher"))
    (teacher / "vae" / "model.onnx").write_text("another format")
    out = Path(shutil.copytree(teacher, tmp_path / "out"))
    check_out(out, teacher)
    (out / "vae" / "model.onnx").write_text("mine")
    with pytest.raises(ValueError, match=r"holds vae/model\.onnx too"):
        check_out(out, teacher)


def test_a_link_leads_to_where_the_checkpoint_is_written(imported: Import, tmp_path: Path) -> None:
    out = tmp_path / "disk" / "real"
    imported("pixart", out=out)
    before = (out / "cascade.json").stat().st_ino
    (tmp_path / "link").symlink_to(out)
    imported("pixart", out=tmp_path / "link")
    assert (tmp_path / "link").readlink() == out and (out / "cascade.json").stat().st_ino != before
    assert [path.name for path in out.parent.iterdir()] == ["real"]
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"nowhere is a link to .*absent, which is not there: remove it, or give"):
        check_out(tmp_path / "nowhere")


def test_nothing_is_written_into_what_is_read_or_over_the_shells_folder(
    base: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"inside lies in .*, which is read"):
        check_out(base("pixart") / "inside", base("pixart"))
    empty = tmp_path / "empty"
    (empty / "vae").mkdir(parents=True)
    (empty / "cascade.json").write_text("{}")
    check_out(empty)
    for start in (empty, empty / "vae"):
        monkeypatch.chdir(start)
        for out in (empty, Path() if start == empty else Path("..")):
            with pytest.raises(ValueError, match="holds the folder that you are in"):
                check_out(out)


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    models = tmp_path / "models"
    out = models / "out"
    out.mkdir(parents=True)
    (out / "old").touch()
    with pytest.raises(OSError, match="Invalid argument"):  # a folder is not moved into itself
        replace_folder(models, out)
    assert [path.name for path in models.iterdir()] == ["out"] and (out / "old").exists()


@pytest.mark.parametrize("killed_at", ["os.rename", "shutil.rmtree"])
def test_a_former_checkpoint_is_put_back_after_a_kill(tmp_path: Path, killed_at: str) -> None:
    """Between the two renames, and while the former one is removed."""
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    for folder, name in ((out, "old"), (scratch, "new")):
        folder.mkdir()
        (folder / name).touch()
    script = f"""
import os, signal, sys
from pathlib import Path
from rmd.published.place import replace_folder
def kill(event, arguments):
    if event == {killed_at!r} and (event == "shutil.rmtree" or str(arguments[1]) == {str(out)!r}):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
replace_folder(Path({str(scratch)!r}), Path({str(out)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert out.exists() == (killed_at == "shutil.rmtree") and len(list(tmp_path.glob(".out-old-*"))) == 1
    stranger = tmp_path / ".out-old-backup" / "former.txt"
    stranger.parent.mkdir()
    stranger.touch()
    said: list[str] = []
    with pytest.raises(OSError, match="full"), whole_folder(out, say=said.append):
        raise OSError("the disk is full")
    assert [path.name for path in out.iterdir()] == (["old"] if killed_at == "os.rename" else ["new"])
    assert said == ([f"put {out} back, which a stopped run had moved away to replace it"] * (killed_at == "os.rename"))
    assert list(tmp_path.glob(".out*")) == [stranger.parent] and stranger.exists()


@pytest.mark.parametrize(("event", "place", "name"), [("os.rename", 1, "out"), ("os.remove", 0, "out/.made-of")])
def test_a_run_that_was_killed_as_it_replaced_goes_on(tmp_path: Path, event: str, place: int, name: str) -> None:
    """Between the two renames, where it said that the files left were made of other settings; and just after them."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "cascade.json").touch()
    script = f"""
import os, signal, sys
from pathlib import Path
from rmd.published.place import whole_folder
def kill(event, arguments):
    if event == {event!r} and str(arguments[{place}]) == {str(tmp_path / name)!r}:
        os.kill(os.getpid(), signal.SIGKILL)
with whole_folder(Path({str(out)!r}), "these files") as scratch:
    (scratch / "cascade.json").write_text("whole")
    sys.addaudithook(kill)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    between = event == "os.rename"
    assert out.exists() is not between and (tmp_path / ".out.importing").exists() is between
    check_out(out)
    said: list[str] = []
    with whole_folder(out, "these files", say=said.append) as scratch:
        assert (scratch / "cascade.json").exists() is between
        (scratch / "cascade.json").touch()
    assert said == between * [
        f"put {out} back, which a stopped run had moved away to replace it",
        "going on with the files that a stopped run has finished",
    ]
    assert [path.name for path in out.iterdir()] == ["cascade.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
