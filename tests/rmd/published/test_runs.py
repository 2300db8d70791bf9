"""Runs that are stopped, meet others or find no room: nothing half made is served, and nothing of anybody's is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from rmd.checkpoint import CheckpointFolder
from rmd.published.gathering import ImportRequest
from rmd.published.importing import import_model
from rmd.published.place import whole_folder
from tests.rmd.published.conftest import TinyFolder, save

Import = Callable[..., Any]
ROOT = Path(__file__).parents[3]


def test_sources_and_strangers_are_never_replaced(base: TinyFolder, imported: Import, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(base("pixart"), own)
    with pytest.raises(ValueError, match="would replace"):
        imported("pixart", base=str(own), out=own)
    with pytest.raises(ValueError, match="would replace"):
        imported("pixart", network=own / "transformer", out=own)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is no checkpoint folder"):
        imported("pixart", base=str(own))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(("room", "component"), [(20_000, "(text_encoder|vae)"), (200_000, "transformer")])
def test_a_full_disk_leaves_the_old_checkpoint(imported: Import, tmp_path: Path, room: int, component: str) -> None:
    """As it copies, and as it merges, whose file alone is larger than 200 kB."""
    import resource

    imported("pixart")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=rf"{component}.* could not be written: .*File too large"):
            imported("pixart")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_import_leaves_nothing_to_serve_and_the_next_one_goes_on(
    base: TinyFolder, imported: Import, tmp_path: Path
) -> None:
    """Killed in the middle of writing: the process stops itself behind its first files, so that the moment is sure."""

    def kill(count: int) -> None:
        script = f"""
import os, signal
from pathlib import Path
from rmd.published.gathering import ImportRequest
from rmd.published.importing import import_model
def report(what, done, total):
    if what == "transformer":
        report.left -= 1
        if not report.left:
            os.kill(os.getpid(), signal.SIGKILL)
report.left = {count}
import_model(ImportRequest(base={str(base("pixart"))!r}, preset="pixart", backbone="pixart", largest=30_000,
    out=Path({str(tmp_path / "out")!r})), report)
"""
        killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr

    kill(60)
    (left,) = tmp_path.iterdir()
    finished = {path.name: path.stat().st_ino for path in (left / "transformer").glob("*.safetensors")}
    assert left.name == ".out.importing" and len(finished) > 2
    with pytest.raises(FileNotFoundError, match=r"cascade\.json does not exist"):
        CheckpointFolder.read(left)
    said: list[str] = []
    imported("pixart", largest=30_000, say=said.append)
    assert said == ["going on with the files that a stopped run has finished"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    CheckpointFolder.read(tmp_path / "out")
    again = {path.name: path.stat().st_ino for path in (tmp_path / "out" / "transformer").glob("*.safetensors")}
    assert len(again) > len(finished) and finished.items() <= again.items()
    imported("pixart", largest=30_000, out=tmp_path / "whole")
    files = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 10 and not any(name.name.endswith(".partial") for name in files)
    differing = [
        name for name in files if (tmp_path / "out" / name).read_bytes() != (tmp_path / "whole" / name).read_bytes()
    ]
    assert differing == [Path("README.md")]  # it names its folder

    shutil.rmtree(tmp_path / "out")
    shutil.copytree(tmp_path / "whole", tmp_path / ".out.importing")
    (tmp_path / ".out.importing" / ".made-of").write_text("something else")
    imported("pixart", say=said.append)
    assert said[1:] == ["starting anew: what a stopped run left was made of other files or settings"]
    assert not (tmp_path / "out" / "transformer" / next(iter(finished))).exists()


def test_a_peft_adapters_settings_are_part_of_what_a_run_goes_on_with(
    base: TinyFolder, imported: Import, tmp_path: Path, lora: dict[str, Tensor]
) -> None:
    """Named by its weight file, it was gone on with after its alpha had changed: half of one scale, half of another."""
    file = save(tmp_path / "peft" / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in lora.items()})
    settings = file.parent / "adapter_config.json"
    settings.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    request = ImportRequest(str(base("wan-1.3b")), "wan", tmp_path / "out", loras=((file, 1.0),), backbone="wan-1.3b")

    def interrupt(what: str, _done: int, _total: int) -> None:
        raise KeyboardInterrupt

    said: list[str] = []
    for alpha, told in ((4, ""), (4, "going on with"), (8, "starting anew: what a stopped run left was made of other")):
        settings.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": alpha}))
        if alpha == 4:
            os.utime(settings, (1, 1))  # the same file, as far as can be told
        with pytest.raises(KeyboardInterrupt):
            import_model(request, interrupt, said.append)
        assert "".join(said).startswith(told) and len(said) == bool(told)
        said.clear()


def test_what_an_interrupted_run_has_finished_stays_and_what_a_failed_one_wrote_goes(tmp_path: Path) -> None:
    out, left = tmp_path / "out", tmp_path / ".out.importing"
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt), whole_folder(out, "these files") as scratch:
        (scratch / "part").touch()
        raise KeyboardInterrupt
    assert (left / "part").is_file()
    with pytest.raises(OSError, match="full"), whole_folder(out, "these files", said.append) as scratch:
        assert (scratch / "part").is_file()
        raise OSError("the disk is full")
    assert len(said) == 1 and not left.exists() and not out.exists()


def test_two_imports_to_one_place(imported: Import, tmp_path: Path) -> None:
    hold = "\n".join(
        [
            "import sys, time",
            "from pathlib import Path",
            "from rmd.published.place import whole_folder",
            f"with whole_folder(Path({str(tmp_path / 'out')!r})):",
            "    print('here', flush=True)",
            "    time.sleep(600)",
        ]
    )
    with subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"here\n"
        with pytest.raises(ValueError, match="another import writes to"):
            imported("pixart")
        other.kill()
    with whole_folder(tmp_path / "out") as scratch:  # the lock died with its holder
        (scratch / "x").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]
