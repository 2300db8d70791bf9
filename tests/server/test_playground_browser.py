"""The playground in a real Chromium, before a real server: what a person sees, hears and presses.

Skipped where no Chromium is installed (Debian: ``apt-get install chromium``), so that the suite asks for no root.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.device.model import DeviceModel
from server.start.settings import ServerSettings
from tests.server.conftest import make_settings
from tests.server.house import House, pixels, serving

playwright = pytest.importorskip("playwright.sync_api", reason="the browser's driver is not installed: pip, extra dev")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here (Debian: chromium)")

PATIENCE_MILLISECONDS = 30_000
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

# What the page must never do, whatever else a test looks at: named controls, and nothing wider than the screen.
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, a, video")]
  .filter((e) => e.checkVisibility() && !(e.ariaLabel || e.textContent.trim() || e.labels?.length || e.alt))
  .map((e) => e.outerHTML)"""

TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
PART_WIDTHS = """() => [...document.querySelectorAll(".chart .bar")].map(
  (bar) => [...bar.children].map((part) => part.getBoundingClientRect().width))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


class Visit:
    """One browser window with a profile of its own; it fails where the page logs an error or asks another server."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(base_url=url, **{"viewport": DESKTOP, **options})
        self.context.set_default_timeout(PATIENCE_MILLISECONDS)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._on_console)
        self.page.on("request", lambda request: self._on_request(request.url, url))
        self.page.goto("/")

    def _on_console(self, message: Any) -> None:
        # A reply of 400 or above is logged by the browser itself; the page is to put it in words.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)

    def _on_request(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "blob:", "data:")):
            self.complaints.append(f"asked {asked}")

    def see(self, selector: str, text: str | re.Pattern[str] | None = None) -> Any:
        """Wait for a visible element, with a text if given, and return it."""
        found = self.page.locator(selector)
        playwright.expect(found.first).to_be_visible(timeout=PATIENCE_MILLISECONDS)
        if text is not None:
            playwright.expect(found.first).to_contain_text(text, timeout=PATIENCE_MILLISECONDS)
        return found

    def see_count(self, selector: str, count: int) -> None:
        playwright.expect(self.page.locator(selector)).to_have_count(count, timeout=PATIENCE_MILLISECONDS)

    def ready(self) -> Visit:
        playwright.expect(self.page.locator("#draw")).to_be_enabled(timeout=PATIENCE_MILLISECONDS)
        return self

    def draw(self, prompt: str = "red apple, noto style", seed: int = 7) -> None:
        self.page.fill("#prompt", prompt)
        self.page.fill("#seed", str(seed))
        self.page.click("#draw")
        self.see("#status", re.compile("^Done in"))

    def close(self) -> None:
        assert self.page.evaluate(NAMELESS) == []
        assert self.page.evaluate(TOO_WIDE) <= 0, "wider than the screen"
        self.context.close()
        assert self.complaints == []


@pytest.fixture
def visit(browser: Any, house: House) -> Iterator[Visit]:
    visiting = Visit(browser, house.url).ready()
    yield visiting
    visiting.close()


def test_a_picture_sharpens_and_its_times_stand_beside_the_teachers(visit: Visit, house: House) -> None:
    full, shown = max(house.model.card.sizes), threading.Event()
    house.gate.before = lambda component, size, inputs: (
        shown.wait(30) if component == "denoiser" and size == full else None
    )
    visit.page.click(".chip >> nth=0")
    assert visit.page.input_value("#prompt") == "red apple, noto style"
    visit.page.fill("#seed", "7")
    visit.page.click("#draw")
    visit.see(".partly img.partial")
    visit.see("figcaption", "32 px")
    visit.see("#status", "A first picture")
    assert visit.page.evaluate("document.querySelector('.partial').naturalWidth") == 32
    shown.set()
    visit.see(".done img.final")
    visit.see("#status", re.compile("^Done in"))
    assert visit.page.evaluate("document.querySelector('.final').naturalWidth") == 64
    legend = [text.replace("\xa0", " ") for text in visit.page.locator(".legend dt").all_text_contents()]
    assert legend == ["queue", "text", "2 steps at 32 px", "2 steps at 64 px", "decode", "package"]
    assert visit.page.locator(".chart .name").all_text_contents() == ["2+2", "teacher, eager"]
    visit.see(".headline", "teacher")
    visit.see_count("#gallery li", 1)


def test_bars_on_one_axis_are_as_long_as_their_seconds(visit: Visit, house: House) -> None:
    visit.draw()
    rmd = visit.page.evaluate("document.querySelector('#gallery li').item.rmd")
    drawn, teacher = visit.page.evaluate(PART_WIDTHS)
    work, length = sum(drawn[1:]), sum(teacher)  # the queue comes first, and is no work
    assert work / length == pytest.approx(rmd["seconds"]["compute"] / rmd["teacher_seconds"]["eager"], rel=0.05)
    visit.see(".headline strong", re.compile(r"^[\d.]+\s×$"))


def test_the_gallery_survives_a_reload(visit: Visit) -> None:
    visit.draw("red apple, noto style", 7)
    visit.draw("rocket, twemoji style", 8)
    visit.page.reload()
    visit.ready()
    visit.see_count("#gallery li", 2)
    visit.see("#lanes h3", "rocket")  # the latest is on the stage again, with its times
    visit.page.click("#gallery li:nth-child(2) button")
    visit.see("#lanes h3", "red apple")
    visit.see(".legend dt", "queue")
    visit.page.click("text=Use again")
    assert visit.page.input_value("#prompt") == "red apple, noto style" and visit.page.input_value("#seed") == "7"
    visit.page.click(".actions >> text=Delete")
    visit.see_count("#gallery li", 1)
    visit.page.focus("#gallery button")
    visit.page.keyboard.press("Delete")
    visit.see_count("#gallery li", 0)
    visit.page.reload()
    visit.ready()
    visit.see_count("#gallery li", 0)
    visit.see(".blank")


def test_a_race_runs_both_from_one_seed(visit: Visit, house: House) -> None:
    visit.page.fill("#prompt", "snowman, noto style")
    visit.page.click("#race")
    visit.see("#status", re.compile("^Done in"))
    visit.see_count(".done img.final", 2)
    captions = visit.page.locator(".lane figcaption").all_text_contents()
    assert len(set(captions)) == 1 and captions[0].startswith("seed ")
    assert visit.page.locator(".chart .name").all_text_contents() == ["2+2", "teacher"]
    visit.see(".headline", "from the same seed")
    clocks = [float(text.removesuffix(" s")) for text in visit.page.locator(".clock").all_text_contents()]
    tracks = [runner.bounding_box()["width"] for runner in visit.page.locator(".runner").all()]
    assert tracks[0] / tracks[1] == pytest.approx(clocks[0] / clocks[1], rel=0.15), "one scale for both"
    visit.see_count("#gallery li", 2)
    assert house.metric("rmd_pictures_total", schedule="teacher") == 1
    assert visit.page.evaluate("document.activeElement.id") == "race", "the keyboard is where it was"


def test_what_is_copied_draws_the_same_picture(visit: Visit, house: House, tmp_path: Path) -> None:
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    prompt = """it's a "red" $HOME `apple` \\ 100 % 🍎"""
    visit.draw(prompt)
    wanted = pixels(house.draw(prompt, seed=7, schedule="2+2").json()["data"][0]["b64_json"])
    ways = [("Python", [sys.executable, "-c"])] + [("curl", ["bash", "-c"])] * bool(shutil.which("curl"))
    for what, shell in ways:
        visit.page.click(f"text=Copy as {what}")
        visit.see("#status", f"Copied as {what}")
        text = visit.page.evaluate("navigator.clipboard.readText()")
        folder = tmp_path / what
        folder.mkdir()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        subprocess.run([*shell, text], cwd=folder, check=True, env={**os.environ, "PATH": path}, timeout=120)
        assert (pixels((folder / "picture.png").read_bytes()) == wanted).all(), what


def test_errors_are_told_in_words_with_their_field(visit: Visit) -> None:
    visit.page.fill("#prompt", "a" * 4001)
    visit.page.click("#draw")
    visit.see("#status.error", "prompt has 4001 characters")
    assert visit.page.get_attribute("#prompt", "aria-invalid") == "true"
    assert visit.page.evaluate("document.activeElement.id") == "prompt"
    visit.see_count("figure", 0)
    visit.page.fill("#prompt", "red apple")
    assert visit.page.get_attribute("#prompt", "aria-invalid") is None


def test_a_prompt_is_text_and_never_markup(visit: Visit) -> None:
    prompt = "<img src=x onerror=alert(1)><b>bold</b>"
    visit.draw(prompt)
    visit.page.reload()
    visit.ready()
    visit.see("#lanes h3", prompt)
    visit.see_count("main b, img[src='x']", 0)


def spoken(visit: Visit) -> str:
    """What a screen reader says of the dial."""
    return str(visit.page.get_attribute("#schedule", "aria-valuetext")).replace("\xa0", " ")


def test_the_keyboard_alone_turns_the_dial_and_draws(visit: Visit, house: House) -> None:
    visit.page.focus("#schedule")
    visit.page.keyboard.press("End")
    assert spoken(visit).startswith("teacher: about 140 ms, 12 passes. Steps: 6 at 64 px")
    visit.see("#guidance")
    visit.page.keyboard.press("Home")
    assert spoken(visit).startswith("2+2")
    assert "The teacher takes 2.3 × as long here." in spoken(visit)
    playwright.expect(visit.page.locator("#guidance")).to_be_hidden()
    visit.page.fill("#prompt", "red apple")
    visit.page.focus("#seed")
    visit.page.keyboard.press("Control+Enter")
    visit.see("#status", re.compile("^Done in"))
    house.gate.close()
    visit.page.keyboard.press("Control+Enter")
    visit.see("#stop")
    visit.page.keyboard.press("Escape")
    visit.see("#status", "Stopped.")
    house.gate.open()
    house.until_idle()


def test_several_pictures_and_their_own_times(visit: Visit) -> None:
    visit.page.fill("#n", "3")
    visit.draw()
    visit.see_count(".done img.final", 3)
    visit.see_count("#gallery li", 3)
    visit.page.click(".lane figure >> nth=2 >> button")
    visit.see(".facts", "9")  # seeds count up


def test_among_several_models_one_is_chosen_and_named(browser: Any, house: House) -> None:
    """This server has one; a second, for films, is put into its list on the way."""
    visit = Visit(browser, house.url).ready()
    (tiny,) = house.client.get("/v1/models").json()["data"]
    film = {**tiny, "id": "tiny-films", "rmd": {**tiny["rmd"], "media": "video"}}
    visit.page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": [tiny, film]}))
    visit.page.reload()
    visit.ready()
    visit.page.check("#models input >> nth=1")
    assert visit.page.locator("#count").is_hidden()
    visit.see(".chip", "moving")
    visit.page.fill("#prompt", "a")
    with visit.page.expect_request("**/v1/videos") as caught:
        visit.page.click("#draw")
    assert caught.value.post_data_json == {"model": "tiny-films", "prompt": "a", "schedule": "2+2"}
    visit.see("#status.error", "makes pictures")
    visit.page.check("#models input >> nth=0")
    visit.draw()
    visit.close()


def test_the_gallery_is_bounded(visit: Visit) -> None:
    visit.page.fill("#n", "10")
    for seed in range(0, 70, 10):
        visit.draw(seed=seed)
    visit.see_count("#gallery li", 60)
    visit.see("#gallery-note", "60 of at most 60")
    seeds = visit.page.evaluate("[...document.querySelectorAll('#gallery li')].map((entry) => entry.item.rmd.seed)")
    assert min(seeds) == 10, "the oldest left"
    visit.page.reload()
    visit.ready().see_count("#gallery li", 60)


def test_a_browser_that_keeps_nothing_says_so(browser: Any, house: House) -> None:
    visit = Visit(browser, house.url)
    visit.page.add_init_script("Object.defineProperty(window, 'indexedDB', { value: undefined })")
    visit.page.reload()
    visit.ready().draw()
    visit.see_count("#gallery li", 1)
    visit.see("#gallery-note", "this browser keeps nothing")
    visit.close()


def test_dark_mode_and_a_phone(browser: Any, house: House, tmp_path: Path) -> None:
    shades = {}
    for scheme in ("light", "dark"):
        phone = Visit(browser, house.url, color_scheme=scheme, viewport=PHONE, has_touch=True, is_mobile=True).ready()
        phone.draw("a word that is very long: " + "a" * 300)
        shades[scheme] = phone.page.evaluate("getComputedStyle(document.body).backgroundColor")
        picture = tmp_path / f"{scheme}.png"
        phone.page.screenshot(path=picture, full_page=True)
        assert picture.stat().st_size > 10_000
        phone.close()
    light, dark = (sum(map(int, re.findall(r"\d+", shades[scheme])[:3])) for scheme in ("light", "dark"))
    assert light > 600 and dark < 150


def test_a_key_is_asked_for_and_never_copied(browser: Any, model: DeviceModel, checkpoint: Path) -> None:
    with serving(model, make_settings(checkpoint, api_keys="secret")) as house:
        visit = Visit(browser, house.url, permissions=["clipboard-read", "clipboard-write"])
        visit.page.fill("#key", "secret")
        visit.page.keyboard.press("Tab")
        visit.ready().draw()
        visit.page.click("text=Copy as curl")
        visit.see("#status", "Copied as curl")
        text = visit.page.evaluate("navigator.clipboard.readText()")
        assert "$RMD_API_KEY" in text and "secret" not in text
        visit.close()


def test_a_film_is_ordered_polled_and_played(
    browser: Any, film_model: DeviceModel, film_settings: ServerSettings
) -> None:
    with serving(film_model, film_settings) as house:
        visit = Visit(browser, house.url).ready()
        assert visit.page.locator("#count").is_hidden()
        visit.draw("rocket, noto style, moving up")
        visit.see(".done video.final")
        film = visit.page.locator("video.final")
        playwright.expect(film).to_have_js_property("readyState", 4, timeout=PATIENCE_MILLISECONDS)
        visit.see(".legend dt", "queue")
        visit.page.click("#race")
        visit.see_count(".done video.final", 2)
        visit.see("#status", re.compile("^Done in"))
        visit.page.reload()
        visit.ready().see_count("#gallery video", 3)
        visit.close()
