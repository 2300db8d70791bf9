"""The page at ``/`` is whole, open to everybody, and loads nothing from elsewhere. Its behaviour needs a browser."""

from __future__ import annotations

import re
from pathlib import Path

from server.device.model import DeviceModel
from tests.server.conftest import make_settings
from tests.server.house import House, serving


def test_the_page_and_all_it_links_to_are_served(house: House) -> None:
    page = house.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    links = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page.text)
    assert {"playground/script.js", "playground/style.css"} <= set(links)
    for link in links:
        assert house.client.get(f"/{link}").status_code == 200, link
    assert house.metric("rmd_requests_total", route="/playground", outcome="completed") == 2


def test_the_script_finds_every_element_and_calls_routes_that_exist(house: House) -> None:
    page, script = house.client.get("/").text, house.client.get("/playground/script.js").text
    wanted = set(re.findall(r'byId\("([^"]+)"\)', script))
    assert wanted
    assert wanted <= set(re.findall(r'id="([^"]+)"', page))
    for path in re.findall(r'(?:fetch|call)\("([^"]+)"', script):
        reply = house.client.get(f"/{path}")
        assert reply.status_code in (200, 405) or reply.json()["error"]["code"] == "model_makes_pictures", path


def test_the_page_allows_its_own_files_only(house: House) -> None:
    for path in ("/", "/playground/script.js", "/playground/style.css"):
        policy = house.client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"<style|<script>|style=|\son\w+=", house.client.get("/").text), "the policy would block it"


def test_the_page_is_open_and_the_api_behind_it_is_not(model: DeviceModel, checkpoint: Path) -> None:
    with serving(model, make_settings(checkpoint, api_keys="secret")) as house:
        assert house.client.get("/").status_code == 200
        assert house.client.get("/v1/models").status_code == 401
