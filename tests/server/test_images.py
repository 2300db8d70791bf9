"""The reply, its options, and the official client, which must work unmodified."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import openai
import pytest
from openai import OpenAI
from PIL import Image

from server.device.model import DeviceModel
from tests.server.conftest import TEACHER_STEPS, make_settings
from tests.server.house import URL, House, pixels, serving


def official(house: House, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{house.url}/v1", api_key=key, max_retries=0, timeout=30)


def test_the_official_client_draws(house: House) -> None:
    reply = official(house).images.generate(
        prompt="a red rocket", model="tiny", n=2, size="64x64", quality="high", extra_body={"seed": 7}
    )
    assert reply.data is not None and len(reply.data) == 2
    pictures = [pixels(data.b64_json or "") for data in reply.data]
    assert [picture.shape for picture in pictures] == [(64, 64, 3)] * 2
    assert (pictures[0] != pictures[1]).any(), "the second picture has the next seed"
    assert reply.size == "64x64" and reply.output_format == "png" and reply.background == "opaque"
    assert reply.usage is not None
    assert reply.usage.input_tokens > 0
    assert reply.usage.output_tokens == 2 * 16
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens


def test_the_official_client_streams(house: House) -> None:
    stream = official(house).images.generate(
        prompt="a red rocket", stream=True, partial_images=2, extra_body={"seed": 7}
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    partial, completed = events
    assert partial.type == "image_generation.partial_image" and completed.type == "image_generation.completed"
    assert partial.partial_image_index == 0 and partial.size == "32x32"
    assert pixels(partial.b64_json).shape == (32, 32, 3)
    assert completed.usage.output_tokens == 16 and completed.usage.input_tokens > 0
    alone = house.draw(seed=7).json()["data"][0]["b64_json"]
    assert (pixels(completed.b64_json) == pixels(alone)).all(), "a stream ends in the picture that a plain call gives"


def test_the_official_client_reads_typed_errors(checkpoint: Path, model: DeviceModel) -> None:
    with serving(model, make_settings(checkpoint, api_keys="right, other")) as house:
        client = official(house, "right")
        with pytest.raises(openai.BadRequestError) as bad:
            client.images.generate(prompt="a", size="63x64")
        assert bad.value.param == "size" and bad.value.type == "invalid_request_error"
        with pytest.raises(openai.NotFoundError) as missing:
            client.images.generate(prompt="a", model="dall-e-3")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.AuthenticationError):
            official(house, "wrong").images.generate(prompt="a")
        assert official(house, "other").images.generate(prompt="a").data
        assert client.models.retrieve("tiny").object == "model"
        assert [entry.id for entry in client.models.list()] == ["tiny"]


def test_the_report_says_how_the_picture_was_made(house: House) -> None:
    report = house.draw(seed=5, n=2).json()["rmd"]
    assert report["seed"] == 5 and report["seeds"] == [5, 6] and report["schedule"] == "2+2"
    assert [(stage["size"], stage["steps"]) for stage in report["stages"]] == [("32x32", 2), ("64x64", 2)]
    assert all(stage["seconds"] > 0 and len(stage["batch_sizes"]) == 2 for stage in report["stages"])
    seconds = report["seconds"]
    parts = seconds["encode"] + sum(s["seconds"] for s in report["stages"]) + seconds["decode"] + seconds["package"]
    assert seconds["compute"] == pytest.approx(parts, abs=1e-4)
    assert seconds["total"] >= seconds["compute"]
    speedup = report["teacher_seconds"]["eager"] / seconds["compute"]
    assert report["speedup"] == {"eager": pytest.approx(speedup, rel=0.01)}


@pytest.mark.parametrize(("schedule", "steps"), [("2+2", 4), ("0+4", 4), ("teacher", TEACHER_STEPS)])
def test_every_schedule_draws_its_own_picture_reproducibly(house: House, schedule: str, steps: int) -> None:
    first, second = house.draw(seed=3, schedule=schedule), house.draw(seed=3, schedule=schedule)
    assert first.status_code == 200, first.text
    assert sum(stage["steps"] for stage in first.json()["rmd"]["stages"]) == steps
    assert first.json()["data"] == second.json()["data"]
    assert first.json()["data"] != house.draw(seed=4, schedule=schedule).json()["data"]


def test_the_server_draws_what_the_offline_sampler_draws(house: House) -> None:
    """The scheduler only reorders work: latents go through the same steps as in rmd.sampler.sample."""
    from rmd.pixels import to_pixels
    from rmd.sampler import sample

    for name in ("2+2", "teacher"):
        backbone, cascade = house.model.backbone, house.model.card.schedules[name].cascade
        latents = sample(
            backbone,
            cascade,
            backbone.encode_prompts(["a red rocket"]),
            [11],
            uncond=backbone.encode_unconditional(1),
        )
        offline = to_pixels(backbone.decode(latents, cascade.full_size))[0].astype("int16")
        served = pixels(house.draw(seed=11, schedule=name).json()["data"][0]["b64_json"])
        assert abs(offline - served).max() <= (0 if name == "2+2" else 1), name


def test_guidance_and_noise_intensity_change_the_picture_where_they_apply(house: House) -> None:
    plain = house.draw(seed=3, schedule="teacher").json()["data"]
    assert house.draw(seed=3, schedule="teacher", guidance_scale=1).json()["data"] != plain
    assert house.draw(seed=3, schedule="teacher", negative_prompt="blue").json()["data"] != plain
    mixed = house.draw(seed=3, noise_intensity=0.2)
    assert mixed.json()["data"] != house.draw(seed=3).json()["data"]
    for field, value in (("guidance_scale", 3.0), ("negative_prompt", "blue")):
        refused = house.draw(**{field: value})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == field
    assert house.draw(schedule="0+4", noise_intensity=0.5).json()["error"]["param"] == "noise_intensity"


@pytest.mark.parametrize(("output_format", "magic"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_formats(house: House, output_format: str, magic: str) -> None:
    compression = {} if output_format == "png" else {"output_compression": 60}
    reply = house.draw(seed=1, output_format=output_format, **compression).json()
    picture = Image.open(io.BytesIO(base64.b64decode(reply["data"][0]["b64_json"])))
    assert picture.format == magic and reply["output_format"] == output_format


def test_compression_makes_smaller_files(house: House) -> None:
    sizes = [
        len(house.draw(seed=1, output_format="jpeg", output_compression=quality).json()["data"][0]["b64_json"])
        for quality in (0, 50, 100)
    ]
    assert sizes[0] < sizes[1] < sizes[2]


def test_a_png_says_how_it_was_made_but_not_what_was_asked(house: House) -> None:
    content = base64.b64decode(house.draw("a very private wish", seed=9).json()["data"][0]["b64_json"])
    texts = Image.open(io.BytesIO(content)).text  # type: ignore[attr-defined]
    assert texts["rmd:seed"] == "9" and texts["rmd:schedule"] == "2+2" and texts["rmd:model"] == "tiny"
    assert b"private" not in content


def test_url_replies_can_be_fetched_without_a_key(house: House) -> None:
    url = house.draw(seed=1, response_format="url").json()["data"][0]["url"]
    assert url.startswith(house.url)
    fetched = house.client.get(url)
    assert fetched.headers["content-type"] == "image/png"
    inline = house.draw(seed=1).json()["data"][0]["b64_json"]
    assert (pixels(fetched.content) == pixels(inline)).all()
    assert house.client.get("/files/nothing.png").status_code == 404


def test_an_idempotency_key_gives_the_stored_reply_and_refuses_another_body(house: House) -> None:
    def keyed(prompt: str, key: str = "k1") -> object:
        body = {"prompt": prompt}
        return house.client.post("/v1/images/generations", json=body, headers={"Idempotency-Key": key})

    house.gate.close()
    first, second = house.in_background(lambda: keyed("a")), house.in_background(lambda: keyed("a"))
    house.until_waiting(1)
    house.gate.open()
    replies = [first.result(), second.result(), keyed("a")]
    assert all(reply.json() == replies[0].json() for reply in replies)
    assert [reply.headers.get("idempotent-replayed") for reply in replies].count("true") == 2
    assert house.metric("rmd_pictures_total") == 1
    assert keyed("b").status_code == 409  # type: ignore[attr-defined]
    assert keyed("b", "k2").status_code == 200  # type: ignore[attr-defined]


def test_a_prompt_that_is_cut_is_told(house: House) -> None:
    """Two prompts that differed after the encoder's last token gave the same bytes, and nothing said why."""
    heard, long = house.draw("a red rocket").json(), house.draw("a red rocket " * 200).json()
    assert heard["rmd"]["cut_tokens"] == 0 and long["rmd"]["cut_tokens"] > 0
    entry = house.client.get("/v1/models/tiny").json()["rmd"]
    assert long["usage"]["input_tokens"] <= entry["text_tokens"]
    with house.client.stream("POST", URL, json={"prompt": "a red rocket " * 200, "stream": True}) as stream:
        assert f'"cut_tokens":{long["rmd"]["cut_tokens"]}' in "".join(stream.iter_text()).replace(" ", "")


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_as_many_partial_pictures_come_as_were_asked_for(house: House, wanted: int) -> None:
    stream = official(house).images.generate(
        prompt="a", stream=True, partial_images=wanted, extra_body={"schedule": "0+4"}
    )
    events = [event.type.removeprefix("image_generation.") for event in stream]
    assert events == ["partial_image"] * wanted + ["completed"]
