"""Films named and laid out as VBench and T2V-CompBench look for them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rmd.backbones.tiny import write_tiny_folder
from training.evaluate.films.layouts import compbench, next_commands, vbench


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(importlib.import_module("cli.evaluate").app, ["films", *map(str, arguments)])


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder("wan-1.3b", tmp_path_factory.mktemp("tiny") / "wan")


def test_vbench_finds_every_film_of_its_prompts(tmp_path: Path) -> None:
    prompts = ["a person, smiling", "A tower in the style of Ukiyo-e"]
    for name, count in (("human_action", 5), ("temporal_flickering", 25)):
        drawings = vbench(name, prompts, tmp_path)
        assert len(drawings) == len({one.seed for one in drawings}) == 2 * count
        # As VBench.build_full_info_json looks for them.
        names = {one.path.name for one in drawings}
        assert all(f"{prompt}-{index}.mp4" in names for prompt in prompts for index in range(count))
        assert {one.path.parent for one in drawings} == {tmp_path / name}
    shifted = vbench("human_action", prompts, tmp_path, first_seed=1)
    assert [one.seed for one in shifted][:4] == [one.seed for one in vbench("human_action", prompts, tmp_path)][1:5]
    for prompt in ("and/or", "é" * 125):
        with pytest.raises(ValueError, match="cannot name a file"):
            vbench("scene", [prompt], tmp_path)


def test_each_vbench_dimension_is_measured_on_the_folder_that_it_wants(tmp_path: Path) -> None:
    lines = next_commands("vbench", tmp_path, ["scene", "subject_consistency"])
    assert f"vbench evaluate --videos_path {tmp_path / 'scene'} --dimension background_consistency" in lines
    assert f"vbench evaluate --videos_path {tmp_path / 'subject_consistency'} --dimension motion_smoothness" in lines
    assert len(lines) == 5 and not any("overall_consistency" in line for line in lines)


def test_compbench_numbers_films_in_the_order_of_its_prompts(tmp_path: Path) -> None:
    names = {"1_consistent_attr": "consistent_attr", "3_spatial_relationship": "spatial_relationships"}
    names |= {"6_interaction": "interaction", "7_numeracy": "generative_numeracy"}
    for file, folder in names.items():
        drawings = compbench(file, [f"prompt {number}" for number in range(100)], tmp_path)
        assert [one.path.name for one in drawings] == sorted(one.path.name for one in drawings)
        assert drawings[0].path == tmp_path / folder / "0001.mp4" and drawings[99].path.name == "0100.mp4"
        assert drawings[7].prompt == "prompt 7"


def test_films_are_drawn_once_into_a_folder_of_one_making(wan: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "1_consistent_attr.txt").write_text("a red fox\na blue ship\n")
    (prompts / "7_numeracy.txt").write_text("two cats\n")
    out = tmp_path / "films"
    options = ["--checkpoint", wan, "--layout", "compbench", "--out", out]
    result = _run("--prompts", prompts / "1_consistent_attr.txt", *options)
    assert result.exit_code == 0, result.output
    assert str(out / "consistent_attr") in result.output
    first = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*.mp4")}
    assert sorted(path.name for path in first) == ["0001.mp4", "0002.mp4"]
    assert [path.name for path in (out / "consistent_attr").iterdir() if path.suffix != ".mp4"] == []
    assert _run("--prompts", prompts, *options).exit_code == 0
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first} == first
    assert (out / "generative_numeracy" / "0001.mp4").is_file()
    record = json.loads((out / "films.json").read_text())
    assert record["layout"] == "compbench" and set(record["prompts"]) == {"1_consistent_attr", "7_numeracy"}

    (prompts / "7_numeracy.txt").write_text("three cats\n")
    for change, message in (
        (["--prompts", prompts], "films of another prompts 7_numeracy: give another --out"),
        (["--prompts", prompts / "1_consistent_attr.txt", "--seed", "1"], "films of another first_seed"),
        (["--prompts", prompts / "1_consistent_attr.txt", "--schedule", "0+6"], "films of another cascade"),
    ):
        refused = _run(*options, *change)
        assert isinstance(refused.exception, ValueError) and message in str(refused.exception), refused.output


def test_what_draws_no_films_is_refused(tmp_path: Path, wan: Path) -> None:
    prompts = tmp_path / "color.txt"
    prompts.write_text("a red fox\n")
    pictures = write_tiny_folder("sd3", tmp_path / "sd3")
    options = ["--prompts", prompts, "--out", tmp_path / "out"]
    refused = _run("--checkpoint", pictures, "--layout", "vbench", *options)
    assert isinstance(refused.exception, ValueError) and "draws pictures" in str(refused.exception)
    refused = _run("--checkpoint", wan, "--layout", "evalcrafter", *options)
    assert "'evalcrafter' is not vbench or compbench" in str(refused.exception)
    assert not (tmp_path / "out").exists()
