from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.engines import app
from cli.main import app as everything
from cli.numbers import buckets_option, whole_numbers
from rmd.backbones.tiny import write_tiny_folder


def test_an_empty_store_is_no_error(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["list", "--engines", str(tmp_path / "none")])
    assert listed.exit_code == 0 and "no engines in" in listed.output and "rmd build" in listed.output
    verified = CliRunner().invoke(app, ["verify", "--engines", str(tmp_path / "none")])
    assert verified.exit_code == 0 and "0 engines sound, 0 not" in verified.output
    pruned = CliRunner().invoke(app, ["prune", "--all", "--engines", str(tmp_path / "none")])
    assert pruned.exit_code == 0 and "0 engines removed" in pruned.output


def test_a_broken_engine_is_reported_and_pruned(tmp_path: Path) -> None:
    (tmp_path / ("0" * 32)).mkdir()
    verified = CliRunner().invoke(app, ["verify", "--engines", str(tmp_path)])
    assert verified.exit_code == 1 and "broken" in verified.output and "is missing" in verified.output
    assert "1 engines removed" in CliRunner().invoke(app, ["prune", "--broken", "--engines", str(tmp_path)]).output
    assert CliRunner().invoke(app, ["verify", "--engines", str(tmp_path)]).exit_code == 0


def test_an_engine_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["list", "--engines", str(tmp_path / "file")])
    assert isinstance(result.exception, ValueError) and "is a file" in str(result.exception)


def test_prune_needs_to_be_told_what(tmp_path: Path) -> None:
    assert "0 engines removed" in CliRunner().invoke(app, ["prune", "--engines", str(tmp_path)]).output
    (tmp_path / ("0" * 32)).mkdir()
    result = CliRunner().invoke(app, ["prune", "--engines", str(tmp_path)])
    assert isinstance(result.exception, ValueError) and "nothing to prune" in str(result.exception)
    result = CliRunner().invoke(app, ["prune", "--key", "abc", "--engines", str(tmp_path)])
    assert isinstance(result.exception, ValueError) and "names 0 engines" in str(result.exception)


def test_buckets_are_read_and_checked() -> None:
    assert buckets_option("1,2, 8") == (1, 2, 8) and buckets_option(None) is None
    for text, message in (("0", "at least 1"), ("1;2", "separated by commas"), ("", "separated by commas")):
        with pytest.raises(ValueError, match=message):
            buckets_option(text)
    assert whole_numbers("--seeds", "0,3", least=0) == (0, 3)
    with pytest.raises(ValueError, match=r"--seeds '-1': every number must be at least 0"):
        whole_numbers("--seeds", "-1", least=0)


def test_several_checkpoints_are_built_as_they_are_served(tmp_path: Path) -> None:
    """The last one alone was built, without a word."""
    folders = [write_tiny_folder(name, tmp_path / name) for name in ("sd3", "embedded")]
    named = [part for folder in folders for part in ("--checkpoint", str(folder))]
    asked = [*named, "--engines", str(tmp_path / "store"), "--backend", "eager", "--dtype", "float32", "--buckets", "1"]
    built = CliRunner().invoke(everything, ["build", *asked])
    assert built.exit_code == 0, built.output
    assert [built.output.count(f"{folder}:") for folder in folders] == [1, 1]
    listed = CliRunner().invoke(everything, ["build", *asked, "--plan"])
    assert listed.output.count("  built    ") > 0 and "missing" not in listed.output
