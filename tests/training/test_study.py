"""The blind study: what the page holds and hides, what its answers say, and the page itself in a real Chromium."""

from __future__ import annotations

import base64
import csv
import importlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner, Result

from training.evaluate.shared.sources import Source
from training.evaluate.study.answers import read_answers, read_key, study_markdown, study_report
from training.evaluate.study.page import make_study

PROMPTS = [f"thing {number}, <b>bold</b></script>" for number in range(6)]
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def _source(folder: Path, colour: str) -> Source:
    """Pictures that tell their source, in their pixels and, as some programs do, in their text."""
    told = PngImagePlugin.PngInfo()
    told.add_text("parameters", f"drawn by {colour}")
    paths = [folder / colour / f"{row:05d}.png" for row in range(len(PROMPTS))]
    (folder / colour).mkdir(parents=True)
    for row, path in enumerate(paths):
        Image.new("RGB", (16, 16), tuple(max(value - row, 0) for value in COLOURS[colour])).save(path, pnginfo=told)
    return Source(f"{colour} model", {0: paths})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_study(_source(folder, "red"), _source(folder, "blue"), PROMPTS, folder / "out", trials=4, seed=3)
    return folder / "out"


def _shown(page: str) -> dict[str, Any]:
    data = re.search(r'<script type="application/json" id="study">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    found: dict[str, Any] = json.loads(data[1])
    return found


def _colour(url: str) -> str:
    with Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) as picture:
        assert not picture.info, "a picture's own text stays behind"
        red, _, blue = picture.getpixel((0, 0))  # type: ignore[misc]
    return "red" if red > blue else "blue"


def test_the_page_hides_what_the_key_tells(study: Path) -> None:
    page, key = (study / "study.html").read_text(), json.loads((study / "key.json").read_text())
    shown = _shown(page)
    assert set(shown) == {"study", "kind", "trials"}
    for text in ("red model", "blue model", "drawn by"):
        assert text not in page
    assert "://" not in page.replace(json.dumps(shown), "")
    names = {"first": "red", "second": "blue"}
    for trial, told in zip(shown["trials"], key["trials"], strict=True):
        assert trial["prompt"] == told["prompt"] and set(trial) == {"trial", "prompt", "left", "right"}
        assert {side: _colour(trial[side]) for side in ("left", "right")} == {
            side: names[told[side]] for side in ("left", "right")
        }
    assert sorted(told["left"] for told in key["trials"]) == ["first", "first", "second", "second"]
    assert len({told["prompt"] for told in key["trials"]}) == 4


def test_order_and_sides_are_the_seeds(study: Path, tmp_path: Path) -> None:
    key = json.loads((study / "key.json").read_text())
    sources = _source(tmp_path, "red"), _source(tmp_path, "blue")
    assert make_study(*sources, PROMPTS, tmp_path / "same", trials=4, seed=3) == key
    other = make_study(*sources, PROMPTS, tmp_path / "other", trials=4, seed=4)
    assert [trial["prompt"] for trial in other["trials"]] != [trial["prompt"] for trial in key["trials"]]
    with pytest.raises(ValueError, match="7 trials of 6 prompts"):
        make_study(*sources, PROMPTS, tmp_path / "more", trials=7)
    film = Source("film", {0: [tmp_path / "film.mp4"] * 6})
    (tmp_path / "film.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="one is a film and the other a picture"):
        make_study(sources[0], film, PROMPTS, tmp_path / "mixed")


KEY = {
    "study": "abc",
    "first": {"name": "ours"},
    "second": {"name": "theirs"},
    "trials": [
        {"trial": n, "left": ("first", "second")[n % 2], "right": ("second", "first")[n % 2]} for n in (1, 2, 3)
    ],
}


def _answers(path: Path, reader: str, choices: list[str], study: str = "abc") -> Path:
    rows = [f"{study},{reader},{trial},{choice},1.5" for trial, choice in enumerate(choices, start=1)]
    path.write_text("\n".join(["study,reader,trial,choice,seconds", *rows]))
    return path


def test_answers_are_counted_by_who_stood_where(tmp_path: Path) -> None:
    files = [
        _answers(tmp_path / "a.csv", "ann", ["right", "left", "tie"]),  # first, first, tie
        _answers(tmp_path / "b.csv", "bob", ["right", "right", "left"]),  # first, second, second
    ]
    report = study_report(read_answers(files, KEY), KEY)
    assert [report["answers"][name] for name in ("first", "second", "tie")] == [3, 2, 1]
    assert report["answers"]["share_of_first"]["value"] == 0.6 and report["answers"]["p_value"] == 1.0
    assert [report["trials"][name] for name in ("first", "second", "tie", "unanswered")] == [1, 1, 1, 0]
    assert report["readers"]["bob"] == {"first": 1, "second": 2, "tie": 0}
    assert report["sides"] == {"left": 2, "right": 3}
    text = study_markdown(report)
    assert "| answers, pooled | 3 | 2 | 1 | 0.600 (0.147 to 0.947) | 1 |" in text
    only = study_report(read_answers(files[:1], {**KEY, "trials": KEY["trials"]}), KEY)
    assert only["trials"]["unanswered"] == 0 and "| ann |" not in study_markdown(only)
    with pytest.raises(ValueError, match="no answers"):
        study_report([], KEY)


def test_answers_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text("[]")
    with pytest.raises(ValueError, match="is no key of a study"):
        read_key(tmp_path / "key.json")
    other = _answers(tmp_path / "other.csv", "ann", ["left"], study="xyz")
    with pytest.raises(ValueError, match=r"other.csv, line 2 is of study xyz, the key of abc"):
        read_answers([other], KEY)
    odd = _answers(tmp_path / "odd.csv", "ann", ["left", "middle"])
    with pytest.raises(ValueError, match=r"line 3: the choice 'middle' is not left, right or tie"):
        read_answers([odd], KEY)
    many = _answers(tmp_path / "many.csv", "ann", ["left"] * 4)
    with pytest.raises(ValueError, match=r"line 5: there is no trial '4'"):
        read_answers([many], KEY)
    once = _answers(tmp_path / "once.csv", "ann", ["left"])
    with pytest.raises(ValueError, match="'ann' has answered trial 1 before"):
        read_answers([once, once], KEY)
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'study'"):
        read_answers([tmp_path / "no.csv"], KEY)


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(importlib.import_module("cli.study").app, [str(argument) for argument in arguments])


def test_the_command_makes_a_study_of_two_and_reports_on_it(tmp_path: Path) -> None:
    for colour in COLOURS:
        _source(tmp_path, colour)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    options = ["--prompts", prompts, "--out", tmp_path / "out"]
    made = _run(tmp_path / "red", tmp_path / "blue", *options, "--trials", "3")
    assert made.exit_code == 0 and str(tmp_path / "out" / "study.html") in made.output, made.output
    key = json.loads((tmp_path / "out" / "key.json").read_text())
    answers = _answers(tmp_path / "a.csv", "ann", ["left", "left", "left"], key["study"])
    told = _run("report", answers, "--key", tmp_path / "out" / "key.json")
    assert told.exit_code == 0 and f"# {tmp_path / 'red'} against {tmp_path / 'blue'}" in told.output
    whole = json.loads(_run("report", answers, "--key", tmp_path / "out" / "key.json", "--json").output)
    assert whole["sides"] == {"left": 3, "right": 0}
    assert "a study compares two; these are 1" in str(_run(tmp_path / "red", *options).exception)
    assert "given twice" in str(_run(tmp_path / "red", tmp_path / "red", *options).exception)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser's driver is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed here (Debian: chromium)")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


def test_a_reader_answers_by_keys_closes_the_page_goes_on_and_saves(browser: Any, study: Path, tmp_path: Path) -> None:
    context = browser.new_context(accept_downloads=True, viewport={"width": 1000, "height": 800})
    complaints: list[str] = []

    def visit() -> Any:
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: complaints.append(request.url) if "://" in request.url[:8] else None)
        page.goto((study / "study.html").as_uri())
        return page

    def answer(page: Any, number: int, key: str) -> None:
        page.wait_for_selector(f"h1:has-text('{number} of 4')")
        page.wait_for_selector("#choices button:enabled")
        page.keyboard.press(key)

    page = visit()
    page.click("#begin")
    assert "Give your name" in page.inner_text("#notice")
    page.fill("#reader", 'Ann "A"')
    page.click("#begin")
    answer(page, 1, "ArrowLeft")
    page.wait_for_selector("h1:has-text('2 of 4')")
    assert page.evaluate("document.querySelectorAll('#pair img').length") == 2
    assert "<b>bold</b></script>" in page.inner_text("#prompt"), "a prompt is text, never markup"
    answer(page, 2, "ArrowDown")
    answer(page, 3, "Backspace")
    answer(page, 2, "ArrowRight")
    page.close()

    page = visit()  # where it was
    answer(page, 3, "ArrowDown")
    page.wait_for_selector("h1:has-text('4 of 4')")
    page.click("#choices button[data-choice=right]")
    page.wait_for_selector("h1:has-text('Thank you')")
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "answers.csv")
    assert re.fullmatch(r"answers-[0-9a-f]{16}-Ann-A-\.csv", download.value.suggested_filename)
    with (tmp_path / "answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["choice"] for row in rows] == ["left", "right", "tie", "right"] and rows[0]["reader"] == 'Ann "A"'
    key = read_key(study / "key.json")
    found = read_answers([tmp_path / "answers.csv"], key)
    assert [one.choice for one in found if one.side] == [
        key["trials"][place][side] for place, side in ((0, "left"), (1, "right"), (3, "right"))
    ]
    context.close()
    own = (study / "study.html").as_uri()
    assert [text for text in complaints if text != own and not text.startswith("data:")] == []
