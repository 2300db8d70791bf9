"""Photographs the playground for docs/: draws on a running server with a headless Chromium.

python scripts/playground_pictures.py http://127.0.0.1:8000 docs
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

PROMPTS = (
    ("red apple, noto style", 1),
    ("sailboat, fluent 3d style", 4),
    ("maple leaf, fluent flat style", 2),
    ("rocket, twemoji style", 3),
    ("snowman, noto style", 5),
)
RACED = ("red apple, noto style", 1)
PATIENCE_MILLISECONDS = 120_000


def draw(page: Page, prompt: str, seed: int, button: str = "#draw") -> None:
    """Draw one picture, or race the teacher, and wait for the report."""
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.click(button)
    expect(page.locator("#status")).to_contain_text("Done", timeout=PATIENCE_MILLISECONDS)
    print(f"{prompt}: {page.inner_text('.headline')}")


def photograph(page: Page, file: Path) -> None:
    """Save what is on the screen, once nothing fades any more."""
    page.evaluate("scrollTo(0, 0)")
    page.evaluate("Promise.all(document.getAnimations().map((each) => each.finished))")
    page.screenshot(path=file)


def main(url: str, folder: Path) -> None:
    """Photograph a race in light and dark, and a lone picture on a phone."""
    chromium = shutil.which("chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": 1200, "height": 1020})
        page.set_default_timeout(PATIENCE_MILLISECONDS)
        page.goto(url)
        page.wait_for_selector("#draw:enabled")
        for prompt, seed in PROMPTS:
            draw(page, prompt, seed)
        photograph(page, folder / "playground.png")
        draw(page, *RACED, button="#race")
        page.emulate_media(color_scheme="dark")
        photograph(page, folder / "playground-race-dark.png")
        phone = browser.new_page(viewport={"width": 390, "height": 844}, device_scale_factor=1.5, is_mobile=True)
        phone.set_default_timeout(PATIENCE_MILLISECONDS)
        phone.goto(url)
        phone.wait_for_selector("#draw:enabled")
        draw(phone, *PROMPTS[1])
        phone.evaluate("document.getElementById('stage').scrollIntoView()")
        phone.evaluate("Promise.all(document.getAnimations().map((each) => each.finished))")
        phone.screenshot(path=folder / "playground-phone.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
