"""`rmd data` and `rmd train-teacher`: what they say when something is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def rmd(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments], capture_output=True, text=True, check=False, timeout=240
    )


def test_a_broken_package_is_one_line_and_code_2(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "emojibase-data-17.0.0.tgz").write_bytes(b"not the package")
    result = rmd("data", "--root", str(tmp_path))
    assert result.returncode == 2
    assert "emojibase-data@17.0.0 is pinned to" in result.stderr
    assert "Traceback" not in result.stderr


def test_training_without_pictures_names_the_command_to_run_first(tmp_path: Path) -> None:
    result = rmd("train-teacher", "--data", str(tmp_path), "--run", str(tmp_path / "run"))
    assert result.returncode == 2
    assert "run `rmd data" in result.stderr
    assert not (tmp_path / "run").exists()


def test_compiled_networks_and_engines_exclude_each_other() -> None:
    ran = rmd("evaluate", "--compile", "--engines", "engines-cache")
    assert ran.returncode == 2 and "leave out --engines" in ran.stderr and "Traceback" not in ran.stderr
