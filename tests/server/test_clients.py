"""Requests as clients in the wild send them, verbatim, and what becomes of each here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import ValidationError

from server.device.model import DeviceModel
from server.start.settings import ServerSettings
from tests.server.conftest import make_settings
from tests.server.house import URL, House, pixels, serving

ALIASES = "gpt-image-1, gpt-image-1-mini=tiny, dall-e-2, dall-e-3, sora-2=tiny-wan"
PROMPT = "a red rocket"

Body = dict[str, Any]

OPEN_WEBUI: Body = {"model": "dall-e-2", "prompt": PROMPT, "n": 1, "response_format": "b64_json"}
N8N: Body = {"prompt": PROMPT, "model": "gpt-image-1-mini", "n": 1, "size": "1024x1024", "quality": "medium"}
LIBRECHAT: Body = {
    "model": "gpt-image-1",
    "prompt": PROMPT,
    "n": 1,
    "background": "auto",
    "output_format": "png",
    "quality": "auto",
    "size": "auto",
}
LANGCHAIN: Body = {"prompt": PROMPT, "n": 1, "size": "1024x1024", "model": "dall-e-2", "quality": "standard"}
HOME_ASSISTANT: Body = {
    "model": "dall-e-3",
    "prompt": PROMPT,
    "size": "1024x1024",
    "quality": "standard",
    "style": "vivid",
    "response_format": "url",
    "n": 1,
}
N8N_FILM: dict[str, str] = {"model": "sora-2", "prompt": PROMPT, "seconds": "4", "size": "1280x720"}
"""Its only film model, a form of several parts; `seconds` and `size` are its first choices."""
VERCEL: Body = {"model": "tiny", "prompt": PROMPT, "n": 1, "response_format": "b64_json"}
AIPERF: Body = {"prompt": PROMPT, "model": "tiny", "response_format": "b64_json", "n": 1}
LITELLM: Body = {
    "model": "tiny",
    "prompt": PROMPT,
    "background": "auto",
    "moderation": "auto",
    "n": 1,
    "output_compression": 100,
    "output_format": "png",
    "quality": "high",
    "response_format": "b64_json",
    "size": "64x64",
    "style": "natural",
    "user": "u1",
}
NEWELLE: Body = {"model": "gpt-image-1", "prompt": PROMPT}
NEXTCLOUD: Body = {"model": "tiny", "prompt": PROMPT, "n": 1, "size": "512x512"}
LOBECHAT: Body = {"model": "tiny", "n": 1, "prompt": PROMPT}

# Body, status as the server is by default, and with aliases and nearest_size.
CLIENTS: list[tuple[str, Body, int, int]] = [
    ("Open WebUI", OPEN_WEBUI, 404, 200),
    ("Open WebUI, a size set", {**OPEN_WEBUI, "size": "512x512"}, 404, 200),
    ("Open WebUI, size auto", {**OPEN_WEBUI, "model": "gpt-image-1", "size": "auto"}, 404, 200),
    ("n8n", N8N, 404, 200),
    ("n8n, older", {**N8N, "model": "dall-e-3", "quality": "hd", "style": "vivid", "response_format": "url"}, 404, 200),
    ("LibreChat", LIBRECHAT, 404, 200),
    ("LangChain", LANGCHAIN, 404, 200),
    ("Home Assistant", HOME_ASSISTANT, 404, 200),
    ("Vercel AI SDK", VERCEL, 200, 200),
    ("AIPerf", AIPERF, 200, 200),
    ("LiteLLM", LITELLM, 200, 200),
    ("Newelle", NEWELLE, 404, 200),
    ("Nextcloud", NEXTCLOUD, 400, 200),
    ("Nextcloud, older", {**NEXTCLOUD, "size": "1024x1024"}, 400, 200),
    ("LobeChat", LOBECHAT, 200, 200),
    ("LobeChat, steps", {**LOBECHAT, "steps": 20, "cfg": 7.5}, 400, 400),
    ("Newelle, a film model", {**NEWELLE, "model": "sora-2"}, 404, 404),
]

# A field, its value, and the words of the error that lead out.
HINTS = [
    ("num_inference_steps", 30, "the schedule fixes the steps: /v1/models lists"),
    ("steps", 20, "the schedule fixes the steps: /v1/models lists"),
    ("seed", -1, "Leave it out"),
    ("extra_body", {}, "send what is in it at the top level"),
    ("nvext", {"seed": 1}, "send what is in it at the top level"),
    ("cfg", 7, "called guidance_scale"),
    ("width", 512, 'say size as "WIDTHxHEIGHT"'),
    ("aspect_ratio", "1:1", 'say size as "WIDTHxHEIGHT"'),
    ("num_images", 2, "called n"),
    ("rng_seed", 1, "called seed"),
    ("image", "x", "draws from text alone"),
    ("colour", "red", "/docs lists the known ones"),
]


@pytest.fixture(scope="module")
def strict(checkpoint: Path, loaded: DeviceModel) -> Iterator[House]:
    with serving(loaded, make_settings(checkpoint)) as running:
        yield running


@pytest.fixture(scope="module")
def lenient(checkpoint: Path, loaded: DeviceModel) -> Iterator[House]:
    folders = (checkpoint, Path("tiny-wan"))  # the film model is not loaded: its alias means nothing yet
    with serving(loaded, make_settings(folders, model_aliases=ALIASES, nearest_size=True)) as running:
        yield running


@pytest.mark.parametrize(("name", "body", "plain", "helped"), CLIENTS, ids=[client[0] for client in CLIENTS])
def test_a_clients_body(strict: House, lenient: House, name: str, body: Body, plain: int, helped: int) -> None:
    refused = strict.client.post(URL, json=body)
    assert refused.status_code == plain, refused.text
    if plain == 404:
        assert refused.json()["error"]["code"] == "model_not_found" and "'tiny'" in refused.json()["error"]["message"]
    reply = lenient.client.post(URL, json=body)
    assert reply.status_code == helped, reply.text
    if helped != 200:
        return
    shown = reply.json()
    (picture,) = shown["data"]
    links = body.get("response_format", "url" if body["model"].startswith("dall-e") else "b64_json") == "url"
    assert bool(picture["url"]) is links and bool(picture["b64_json"]) is not links
    content = lenient.client.get(picture["url"]).content if links else picture["b64_json"]
    height, width, _ = pixels(content).shape
    assert shown["size"] == f"{width}x{height}" == "64x64", "the true size, whatever was asked for"


@pytest.mark.parametrize(
    ("settings", "status", "param", "words"),
    [
        ({}, 404, "model", "this server holds 'tiny-wan'"),
        ({"model_aliases": "sora-2"}, 400, "size", "48x48"),
        ({"model_aliases": "sora-2", "nearest_size": True}, 400, "seconds", "ask for that or nothing"),
    ],
    ids=["plain", "by its alias", "and the nearest size"],
)
def test_n8ns_film_is_refused_by_what_is_not_so_here(
    film_checkpoint: Path, film_model: DeviceModel, settings: Body, status: int, param: str, words: str
) -> None:
    """A film of another length than the model's is none that was asked for, whatever its name and size."""
    with serving(film_model, make_settings(film_checkpoint, **settings)) as house:
        reply = house.client.post("/v1/videos", files={name: (None, value) for name, value in N8N_FILM.items()})
        assert reply.request.headers["content-type"].startswith("multipart/form-data; boundary=")
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (status, param) and words in error["message"], reply.text
        assert house.client.get("/v1/videos").json()["data"] == []


@pytest.mark.parametrize(("field", "value", "words"), HINTS)
def test_a_field_of_other_servers_is_explained(strict: House, field: str, value: Any, words: str) -> None:
    reply = strict.draw(**{field: value})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == field
    assert words in reply.json()["error"]["message"]
    assert strict.metric("rmd_in_flight_items") == 0


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/images/variations"])
def test_drawing_from_pictures_is_refused_by_name(strict: House, path: str) -> None:
    for content in (b"x", bytes(500_000)):  # above the bound of bodies too
        form = {"model": "gpt-image-1", "prompt": PROMPT}
        reply = strict.client.post(path, data=form, files={"image[]": ("a.png", content, "image/png")})
        assert reply.status_code == 404, reply.text
        assert reply.json()["error"]["code"] == "unsupported_endpoint"
        assert "draws from text alone" in reply.json()["error"]["message"]
    client = OpenAI(base_url=f"{strict.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="text alone"):
        client.images.create_variation(image=b"x")


def test_aliases_are_listed_and_told_nowhere_else(lenient: House) -> None:
    client = OpenAI(base_url=f"{lenient.url}/v1", api_key="none", max_retries=0)
    listed = [model.id for model in client.models.list()]
    assert listed == ["tiny", "gpt-image-1", "gpt-image-1-mini", "dall-e-2", "dall-e-3"]
    assert client.models.retrieve("dall-e-3").id == "dall-e-3"
    reply = client.images.generate(prompt=PROMPT, model="gpt-image-1", size="1536x1024")
    assert "gpt-image-1" not in reply.model_dump_json()
    assert lenient.draw(model="gpt-image-1", size="64 x 64").status_code == 400, "what is no size is none"
    assert lenient.draw(model="gpt-image-1", size="0x64").status_code == 400


def test_an_alias_that_means_nothing_is_refused_at_start(checkpoint: Path) -> None:
    for aliases, words in (("tiny", "own name"), ("a=b", "'a' is to mean 'b', and there are tiny")):
        with pytest.raises(ValidationError, match=words):
            ServerSettings.model_validate({"checkpoint": checkpoint, "model_aliases": aliases})
