"""The page at ``/`` is whole, open to everybody, and loads nothing from elsewhere.

What it does in a browser is tested in ``test_playground_browser.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

import server.playground
from server.device.model import DeviceModel
from tests.server.conftest import make_settings
from tests.server.house import House, serving

FOLDER = Path(server.playground.__file__).parent
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.js"))
STYLES = sorted(path.name for path in FOLDER.glob("*.css"))


def test_the_page_and_all_it_links_to_are_served(house: House) -> None:
    page = house.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    links = re.findall(r'(?:src|href)="(?!data:|#)([^"]+)"', page.text)
    assert {f"playground/{style}" for style in STYLES} | {"playground/script.js"} <= set(links)
    for link in links:
        assert house.client.get(f"/{link}").status_code == 200, link
    assert house.metric("rmd_requests_total", route="/playground", outcome="completed") == 1 + len(STYLES)


def test_every_module_is_served_and_imports_what_is_there(house: House) -> None:
    imported = {"script.js"}
    for name in SCRIPTS:
        reply = house.client.get(f"/playground/{name}")
        assert reply.headers["content-type"].startswith("text/javascript"), name
        for names, module in re.findall(r'^import \{([^}]+)\} from "\./([^"]+)";$', reply.text, re.MULTILINE):
            imported.add(module)
            for wanted in names.split(","):
                exported = rf"^export (?:async )?(?:function|class|const) {wanted.strip()}\b"
                assert re.search(exported, (FOLDER / module).read_text(), re.MULTILINE), f"{name}: {wanted}"
    assert imported == set(SCRIPTS), "a module that nothing uses"


def test_nothing_but_the_pages_own_files_is_served(house: House) -> None:
    for path in ("__init__.py", "index.html", "%2e%2e/__init__.py", "../__init__.py", ""):
        assert house.client.get(f"/playground/{path}").status_code == 404, path


def test_the_scripts_find_every_element_and_call_routes_that_exist(house: House) -> None:
    page = house.client.get("/").text
    script = "\n".join((FOLDER / name).read_text() for name in SCRIPTS)
    wanted = set(re.findall(r'byId\("([^"]+)"\)', script))
    assert wanted
    assert wanted <= set(re.findall(r'id="([^"]+)"', page))
    paths = re.findall(r'(?:fetch|call)\("([^"]+)"', script)
    assert {"v1/models", "v1/images/generations", "v1/videos", "health/ready"} == set(paths)
    for path in paths:
        reply = house.client.get(f"/{path}")
        assert reply.status_code in (200, 405) or reply.json()["error"]["code"] == "model_makes_pictures", path


def test_no_text_is_ever_read_as_markup_and_nothing_comes_from_elsewhere() -> None:
    for path in FOLDER.iterdir():
        if path.suffix not in (".js", ".css", ".html"):
            continue
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", text), path
        assert set(re.findall(r"https?://[^\s\"'`]+", text)) <= {"http://www.w3.org/2000/svg"}, path
        assert not re.search(r"@import|\burl\(", text), path
        assert len(text.splitlines()) <= 400 and max(map(len, text.splitlines())) <= 120, path


def test_the_page_allows_its_own_files_only(house: House) -> None:
    for path in ("/", "/playground/script.js", "/playground/style.css"):
        policy = house.client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"<style|<script>|style=|\son\w+=", house.client.get("/").text), "the policy would block it"


def test_the_page_is_open_and_the_api_behind_it_is_not(model: DeviceModel, checkpoint: Path) -> None:
    with serving(model, make_settings(checkpoint, api_keys="secret")) as house:
        assert house.client.get("/").status_code == 200
        assert house.client.get("/v1/models").status_code == 401
