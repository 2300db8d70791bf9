"""The folder that an import writes: who may read it, what it may replace, and what a stopped run leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rmd.published.place import whole_folder
from tests.rmd.published.conftest import closed_to_others

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
