"""The GPU script on the CPU: tiny networks through the very steps and cases that a lent machine runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu.cases import CASES

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_bench.sh"


def run(out: Path, *steps: str) -> None:
    here = {
        "DEVICE": "cpu",
        "SCALE": "tiny",
        "MINUTES": "40",
        "PATIENCE": "8",
        "OUT": str(out),
        "PYTHON": sys.executable,
    }
    done = subprocess.run(["bash", str(SCRIPT), *steps], env={**os.environ, **here}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("part", "step"), [(1, "first"), (2, "second")])
def test_every_case_says_something_and_ends_well(part: int, step: str, tmp_path: Path) -> None:
    run(tmp_path, step)
    content = json.loads((tmp_path / f"gpu-{part}.json").read_text())
    assert [entry["case"] for entry in content["cases"]] == [case.name for case in CASES if case.part == part]
    for entry in content["cases"]:
        assert entry["ended"] == "done" and entry["rows"], entry
        assert not [row for row in entry["rows"] if "failed" in row], entry
        assert all(row.get("relative L2", 0.0) < 0.2 for row in entry["rows"]), entry
    said = (tmp_path / f"gpu-{part}.md").read_text()
    assert ("AOTInductor works here in every stage" in said) == (part == 1)


@pytest.mark.timeout(900)
def test_every_familys_speedup_is_rehearsed(tmp_path: Path) -> None:
    run(tmp_path, "check")
    reports = {path.name for path in (tmp_path / "rehearsal").glob("*.json")}
    assert {f"speedup-{name}-cpu-tiny.json" for name in ("sdxl", "pixart", "sd3", "wan-14b")} <= reports
    run(tmp_path / "none", "list")
    assert not (tmp_path / "none").exists()
