"""``/v1/videos`` on tiny Wan networks: jobs, films, cancelling, and what a restart leaves."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from rmd.pixels import to_pixels
from rmd.sampler import sample
from server.device.model import DeviceModel
from server.films.tables import VideoJob
from server.front.media import encode_film
from server.front.service import Service
from server.start.films import open_jobs
from server.start.settings import ServerSettings
from tests.server.house import House, serving
from tests.server.thread_engine import ThreadEngine

URL = "/v1/videos"
PROMPT = "a red rocket"


@pytest.fixture
def house(film_model: DeviceModel, film_settings: ServerSettings) -> Iterator[House]:
    with serving(film_model, film_settings) as running:
        yield running


def post(house: House, prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
    reply = house.client.post(URL, json={"prompt": prompt, **fields})
    assert reply.status_code == 200, reply.text
    job: dict[str, Any] = reply.json()
    return job


def read(house: House, job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = house.client.get(f"{URL}/{job['id']}").json()
    return found


def ended(house: House, job: dict[str, Any]) -> dict[str, Any]:
    house.until(lambda: read(house, job)["status"] in ("completed", "failed"), f"the end of {job['id']}")
    return read(house, job)


def content(house: House, job: dict[str, Any], variant: str = "video") -> bytes:
    reply = house.client.get(f"{URL}/{job['id']}/content", params={"variant": variant})
    assert reply.status_code == 200, reply.text
    return reply.content


def error_of(reply: httpx.Response) -> tuple[int, str | None, str | None]:
    error = reply.json()["error"]
    return reply.status_code, error["param"], error["code"]


def test_the_openai_client_makes_polls_and_fetches_a_film(house: House, film_model: DeviceModel) -> None:
    client = openai.OpenAI(base_url=f"{house.url}/v1", api_key="unused", max_retries=0)
    with pytest.warns(DeprecationWarning):
        job = client.videos.create_and_poll(prompt=PROMPT, extra_body={"seed": 5}, poll_interval_ms=20)
        assert (job.status, job.progress, job.object) == ("completed", 100, "video")
        cascade = film_model.card.schedules[film_model.card.default].cascade
        size = cascade.full_size
        assert job.size == f"{size.width}x{size.height}" and job.prompt == PROMPT
        assert float(job.seconds) == pytest.approx(size.num_frames / 16, abs=0.005)
        assert job.completed_at is not None and job.expires_at == pytest.approx(job.completed_at + 86400, abs=2)
        film = client.videos.download_content(job.id).read()
        thumbnail = Image.open(io.BytesIO(client.videos.download_content(job.id, variant="thumbnail").read()))
        sheet = Image.open(io.BytesIO(client.videos.download_content(job.id, variant="spritesheet").read()))
        assert [video.id for video in client.videos.list()] == [job.id]
        assert client.videos.delete(job.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(job.id)
    backbone = film_model.backbone
    latents = sample(backbone, cascade, backbone.encode_prompts([PROMPT]), [5])
    expected = to_pixels(backbone.decode(latents, size))[0]
    assert film == encode_film(expected, 16)
    assert thumbnail.size == (size.width, size.height) and thumbnail.format == "WEBP"
    assert sheet.format == "JPEG" and sheet.width >= 2 * min(320, size.width)


def test_a_completed_job_says_how_it_was_made(house: House) -> None:
    job = ended(house, post(house, seed=3, schedule="teacher", guidance_scale=2))
    assert job["rmd"]["schedule"] == "teacher" and job["rmd"]["seed"] == 3
    assert sum(stage["steps"] for stage in job["rmd"]["stages"]) == 4
    assert job["rmd"]["seconds"]["compute"] > 0 and set(job["rmd"]["speedup"]) == {"eager"}
    assert house.metric("rmd_pictures_total", schedule="teacher") == 1
    house.until(lambda: house.metric("rmd_video_jobs", status="completed") == 1, "its row in the metrics")


def test_the_same_request_gives_the_same_film_whoever_shares_its_batch(house: House) -> None:
    house.gate.close()
    jobs = [post(house, seed=seed) for seed in (1, 2, 1)]
    house.gate.open()
    films = [content(house, ended(house, job)) for job in jobs]
    assert films[0] == films[2] != films[1]


def test_progress_begins_with_the_first_step_and_only_rises(house: House) -> None:
    house.gate.close()
    job = post(house)
    house.gate.arrived.wait(30)
    assert read(house, job)["status"] == "queued"  # its prompt is being encoded
    seen: list[int] = []
    house.gate.before = lambda component, size, inputs: seen.append(read(house, job)["progress"])
    house.gate.open()
    assert ended(house, job)["progress"] == 100
    assert seen == sorted(seen)
    reply = house.client.get(f"{URL}/{job['id']}")
    assert "openai-poll-after-ms" not in reply.headers


def test_an_unfinished_job_says_when_to_ask_again_and_has_no_content(house: House) -> None:
    house.gate.close()
    job = post(house)
    reply = house.client.get(f"{URL}/{job['id']}")
    assert 250 <= int(reply.headers["openai-poll-after-ms"]) <= 10_000
    assert error_of(house.client.get(f"{URL}/{job['id']}/content")) == (409, None, "video_not_ready")
    assert error_of(house.client.post(f"{URL}/{job['id']}/remix", json={"prompt": "x"})) == (
        409,
        None,
        "video_not_ready",
    )
    house.gate.open()
    assert ended(house, job)["status"] == "completed"


def test_a_cancelled_job_leaves_the_device_at_the_next_step(house: House) -> None:
    house.gate.close()
    job = post(house)
    house.gate.arrived.wait(30)
    assert house.client.delete(f"{URL}/{job['id']}").json() == {
        "id": job["id"], "object": "video.deleted", "deleted": True
    }  # fmt: skip
    found = read(house, job)
    assert found["status"] == "failed" and found["error"]["code"] == "cancelled"
    house.until(lambda: house.service.fleet.depths()["encode"] == 0, "nothing waiting")
    time.sleep(0.2)  # the jobs' thread hears of it
    house.gate.open()
    house.until_idle()
    assert {component for component, _, _ in house.gate.calls} <= {"text_encoder"}
    assert house.client.delete(f"{URL}/{job['id']}").status_code == 200  # now it is forgotten
    assert house.client.get(f"{URL}/{job['id']}").status_code == 404


def test_a_job_that_breaks_the_network_fails_alone(house: House) -> None:
    calls = 0

    def break_one(component: str, size: object, inputs: Any) -> None:
        nonlocal calls
        calls += component == "denoiser"
        if component == "denoiser" and calls <= 2:  # a batch that raises is tried once more, entry by entry
            raise RuntimeError("broken")

    house.gate.before = break_one
    guilty = ended(house, post(house))
    assert guilty["status"] == "failed" and guilty["error"]["code"] == "engine_failed"
    assert "broken" not in guilty["error"]["message"]
    assert house.client.get(f"{URL}/{guilty['id']}/content").status_code == 404
    assert ended(house, post(house))["status"] == "completed"


def test_a_remix_is_another_prompt_from_the_same_noise(house: House) -> None:
    first = ended(house, post(house, seed=9, fps=8))
    reply = house.client.post(f"{URL}/{first['id']}/remix", json={"prompt": "a blue boat"})
    remix = ended(house, reply.json())
    assert remix["remixed_from_video_id"] == first["id"] and remix["prompt"] == "a blue boat"
    assert (remix["rmd"]["seed"], remix["seconds"]) == (9, first["seconds"])
    assert content(house, remix) == content(house, ended(house, post(house, "a blue boat", seed=9, fps=8)))


def test_lists_come_in_pages(house: House) -> None:
    house.gate.close()
    ids = [post(house)["id"] for _ in range(5)]
    page = house.client.get(URL, params={"limit": 2}).json()
    assert [job["id"] for job in page["data"]] == [ids[4], ids[3]]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[4], ids[3], True)
    page = house.client.get(URL, params={"limit": 3, "after": ids[3]}).json()
    assert [job["id"] for job in page["data"]] == [ids[2], ids[1], ids[0]] and not page["has_more"]
    oldest = house.client.get(URL, params={"order": "asc", "after": ids[0], "limit": 1}).json()
    assert [job["id"] for job in oldest["data"]] == [ids[1]]
    assert error_of(house.client.get(URL, params={"after": "video_none"}))[:2] == (400, "after")
    assert error_of(house.client.get(URL, params={"limit": 0}))[:2] == (400, "limit")
    house.gate.open()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": " "}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"model": "sora-2"}, "model"),
        ({"size": "720x1280"}, "size"),
        ({"seconds": "4"}, "seconds"),
        ({"seconds": "soon"}, "seconds"),
        ({"seconds": 10**400}, "seconds"),
        ({"num_frames": 6}, "num_frames"),
        ({"fps": 0}, "fps"),
        ({"schedule": "9+9"}, "schedule"),
        ({"negative_prompt": "blur"}, "negative_prompt"),
        ({"seed": -1}, "seed"),
        ({"input_reference": {"image_url": "https://example.org/x.png"}}, "input_reference"),
        ({"n": 2}, "n"),
    ],
)
def test_bad_fields_are_named_in_json_and_in_forms(house: House, fields: dict[str, Any], param: str) -> None:
    body = {"prompt": PROMPT, **fields}
    replies = [house.client.post(URL, json=body)]
    if param != "input_reference" and not isinstance(body["prompt"], int):
        replies.append(house.client.post(URL, files={name: (None, str(value)) for name, value in body.items()}))
    for reply in replies:
        assert reply.status_code in (400, 404) and reply.json()["error"]["param"] == param, reply.text
    assert house.client.get(URL).json()["data"] == []


def test_unreadable_bodies_and_files_are_refused(house: House) -> None:
    assert error_of(house.client.post(URL, content=b"{", headers={"Content-Type": "application/json"}))[0] == 400
    assert error_of(house.client.post(URL, json=[1]))[0] == 400
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    assert error_of(house.client.post(URL, content=b"--y\r\nnothing", headers=broken))[0] == 400
    picture = {"prompt": (None, PROMPT), "input_reference": ("x.png", b"png", "image/png")}
    assert error_of(house.client.post(URL, files=picture))[:2] == (400, "input_reference")
    large = {"prompt": (None, PROMPT), "input_reference": ("x.png", bytes(200_000), "image/png")}
    assert error_of(house.client.post(URL, files=large))[:2] == (413, None)
    assert house.client.put(URL).status_code == 405


def test_pictures_and_films_point_at_each_other(house: House) -> None:
    assert error_of(house.draw()) == (400, "model", "model_makes_films")
    entry = house.client.get("/v1/models").json()["data"][0]["rmd"]
    assert entry["media"] == "video" and entry["fps"] == 16 and entry["num_frames"] > 1


def test_an_idempotency_key_makes_one_job(house: House) -> None:
    headers = {"Idempotency-Key": "k"}
    first = house.client.post(URL, files={"prompt": (None, PROMPT)}, headers=headers)
    again = house.client.post(URL, files={"prompt": (None, PROMPT)}, headers=headers)
    assert first.json()["id"] == again.json()["id"] and again.headers["Idempotent-Replayed"] == "true"
    other = house.client.post(URL, files={"prompt": (None, "another")}, headers=headers)
    assert error_of(other) == (409, "Idempotency-Key", "idempotency_key_reused")
    assert len(house.client.get(URL).json()["data"]) == 1


def test_the_queue_of_films_is_bounded(film_model: DeviceModel, film_settings: ServerSettings) -> None:
    with serving(film_model, film_settings.model_copy(update={"video_queue": 2})) as house:
        house.gate.close()
        kept = [post(house), post(house)]
        refused = house.client.post(URL, json={"prompt": PROMPT})
        assert error_of(refused)[0] == 429 and int(refused.headers["Retry-After"]) >= 1
        house.gate.open()
        assert {ended(house, job)["status"] for job in kept} == {"completed"}
        assert ended(house, post(house))["status"] == "completed"


def test_films_that_wait_for_each_other_do_not_lose_their_time(
    film_model: DeviceModel, film_settings: ServerSettings
) -> None:
    with serving(film_model, film_settings.model_copy(update={"video_deadline_seconds": 1.5})) as house:
        house.gate.close()
        jobs = [post(house, seed=seed) for seed in range(3)]
        time.sleep(1.6)  # nothing has begun
        house.gate.open()
        assert {ended(house, job)["status"] for job in jobs} == {"completed"}
        late = post(house)
        house.gate.before = lambda component, size, inputs: time.sleep(1.6 * (component == "denoiser"))
        assert ended(house, late)["error"]["code"] == "deadline_exceeded"


def test_keys_see_their_own_jobs_only(film_model: DeviceModel, film_settings: ServerSettings) -> None:
    with_keys = ServerSettings.model_validate({**film_settings.model_dump(), "api_keys": ("one", "two")})
    with serving(film_model, with_keys) as house:
        mine = {"Authorization": "Bearer one"}
        others = {"Authorization": "Bearer two"}
        job = house.client.post(URL, json={"prompt": PROMPT}, headers=mine).json()
        path = f"{URL}/{job['id']}"
        assert house.client.get(path).status_code == 401
        assert house.client.get(path, headers=mine).status_code == 200
        assert house.client.get(path, headers={"Authorization": "bearer  one"}).status_code == 200  # the same key
        for method, where in (("GET", path), ("GET", f"{path}/content"), ("DELETE", path), ("POST", f"{path}/remix")):
            reply = house.client.request(method, where, headers=others, json={"prompt": "x"})
            assert reply.status_code == 404, (method, where)
        assert house.client.get(URL, headers=others).json()["data"] == []


def test_one_of_several_keys_may_not_fill_the_line(film_model: DeviceModel, film_settings: ServerSettings) -> None:
    keys = {"api_keys": ("one", "two"), "video_queue": 4}
    with serving(film_model, ServerSettings.model_validate({**film_settings.model_dump(), **keys})) as house:
        house.gate.close()

        def send(key: str) -> httpx.Response:
            return house.client.post(URL, json={"prompt": PROMPT}, headers={"Authorization": f"Bearer {key}"})

        replies = [send("one") for _ in range(4)]
        assert [reply.status_code for reply in replies] == [200] * 3 + [429]
        assert error_of(replies[3])[2] == "key_share_used" and int(replies[3].headers["Retry-After"]) >= 1
        assert [send("two").status_code for _ in range(2)] == [200, 429]


def test_jobs_outlast_a_restart(film_model: DeviceModel, film_settings: ServerSettings) -> None:
    with serving(film_model, film_settings) as house:
        done = ended(house, post(house, seed=1))
        film = content(house, done)
        house.gate.close()
        begun, waiting = post(house, seed=1), post(house, seed=2)
        house.gate.arrived.wait(30)
        stopping = house.in_background(house.service.stop)
        time.sleep(0.1)
        house.gate.open()
        stopping.result(60)
    with serving(film_model, film_settings) as house:
        assert read(house, done)["status"] == "completed" and content(house, done) == film
        assert content(house, ended(house, begun)) == film  # the same seed, whenever it is made
        assert ended(house, waiting)["status"] == "completed"


def test_a_film_checkpoint_without_a_place_for_its_films_says_so(
    film_model: DeviceModel, film_settings: ServerSettings, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x")
    for place in ({}, {"objects": str(tmp_path / "objects")}):
        unusable = film_settings.model_copy(update={"videos": blocked, **place})
        with pytest.raises(ValueError, match=f"{blocked}.*File exists"):
            Service(unusable, open_jobs, [("cpu", lambda: ThreadEngine(film_model))])


def test_what_is_paged_through_may_be_deleted(house: House) -> None:
    """The sixth page asked for what follows a film that was gone, and was refused."""
    jobs = [post(house, seed=seed) for seed in range(5)]
    for job in jobs:
        ended(house, job)
    client = openai.OpenAI(base_url=f"{house.url}/v1", api_key="x", max_retries=0)
    with pytest.warns(DeprecationWarning):
        for video in client.videos.list(limit=2):
            assert client.videos.delete(video.id).deleted
    assert house.client.get(URL).json()["data"] == []
    house.until(lambda: house.metric("rmd_video_jobs") == 0, "none in the metrics")
    assert house.client.get(f"{URL}/{jobs[0]['id']}").status_code == 404


def test_what_has_expired_does_not_read_as_there(film_model: DeviceModel, film_settings: ServerSettings) -> None:
    with serving(film_model, film_settings.model_copy(update={"video_seconds": 0.5})) as house:
        job = post(house)
        url = f"{URL}/{job['id']}"
        house.until(lambda: house.client.get(url).status_code == 404, "its end, before anybody has tidied up")
        assert house.client.get(f"{url}/content").status_code == 404 and house.client.get(URL).json()["data"] == []


def test_a_film_that_nobody_makes_any_more_reads_as_waiting(house: House) -> None:
    """Of a model that is no longer served: in_progress for a day, to be asked for four times a second."""
    store, now = house.service.jobs.store, time.time()
    request = {"prompt": PROMPT, "schedule": "x", "seed": 1, "fps": 16}
    left = store.add(VideoJob("", "gone", request, seconds="1", size="32x32", created_at=now))
    assert store.claim(["gone"], "dead", -1) and store.advance(left.id, "dead", 40)
    reply = house.client.get(f"{URL}/{left.id}")
    assert (reply.json()["status"], reply.json()["progress"]) == ("queued", 0)
    assert reply.headers["openai-poll-after-ms"] == "10000"


def test_films_are_nobody_elses_on_the_machine(house: House) -> None:
    records = house.service.settings.videos / "jobs.sqlite3"
    for kept in (house.service.settings.videos, records):
        assert kept.stat().st_mode & 0o077 == 0, kept


def test_a_film_is_sent_once_to_who_has_it(house: House) -> None:
    url = f"{URL}/{ended(house, post(house))['id']}/content"
    first = house.client.get(url)
    etag, modified = first.headers["etag"], first.headers["last-modified"]
    head = house.client.head(url)
    assert head.status_code == 200 and head.content == b"" and head.headers["content-length"] == str(len(first.content))
    for condition in (
        *({"If-None-Match": tags} for tags in (etag, f'"x", {etag}', f"W/{etag}")),
        {"If-Modified-Since": modified},
    ):
        again = house.client.get(url, headers=condition)
        assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == etag, condition
    for condition in (
        {"If-None-Match": '"x"', "If-Modified-Since": modified},
        {"If-Modified-Since": "Thu, 01 Jan 1970 00:00:00 GMT"},
        {"If-Modified-Since": "yesterday"},
        {"If-Match": etag},
    ):
        assert house.client.get(url, headers=condition).content == first.content, condition
    early = {"If-Unmodified-Since": "Thu, 01 Jan 1970 00:00:00 GMT"}
    weak = {"If-Match": f"W/{etag}"}  # the strong comparison, unlike If-None-Match's (RFC 9110, 13.1.1)
    for condition in ({"If-Match": '"x"'}, weak, early):
        assert error_of(house.client.get(url, headers=condition)) == (412, None, "precondition_failed"), condition


def test_ranges_of_a_film(house: House) -> None:
    url = f"{URL}/{ended(house, post(house))['id']}/content"
    whole = house.client.get(url).content
    part = house.client.get(url, headers={"Range": "bytes=5-9"})
    assert part.status_code == 206 and part.content == whole[5:10]
    for digits in (18, 30, 5000):  # a last position beyond the end is the end (RFC 9110, 14.1.2)
        far = "9" * digits
        for span, expected in ((f"0-{far}", whole), (f"5-{far}", whole[5:]), (f"-{far}", whole)):
            long = house.client.get(url, headers={"Range": f"bytes={span}"})
            assert long.status_code == 206 and long.content == expected, (digits, span[:3])
        assert house.client.get(url, headers={"Range": f"bytes={far}-"}).status_code == 416
    beyond = house.client.get(url, headers={"Range": f"bytes={len(whole)}-"})
    assert (
        error_of(beyond) == (416, None, "invalid_range") and beyond.headers["content-range"] == f"bytes */{len(whole)}"
    )
    assert error_of(house.client.get(url, headers={"Range": "bytes=9-5"})) == (416, None, "invalid_range")
    assert house.client.get(url, headers={"Range": "frames=1-2"}).content == whole, "other units are ignored"
