"""Servers that share a store: films and linked pictures over HTTP, whoever made them, and while the store is away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.device.model import DeviceModel
from server.films.shelf import film_object
from server.front.service import Service
from server.start.films import open_jobs
from server.start.settings import ServerSettings
from tests.server.conftest import make_settings
from tests.server.house import House, serving
from tests.server.test_videos import URL as FILMS
from tests.server.test_videos import ended, error_of, post
from tests.server.weed import S3Server, free_ports


@pytest.fixture
def pair(loaded: DeviceModel, checkpoint: Path, s3: S3Server, tmp_path: Path) -> Iterator[tuple[House, House]]:
    """Two servers with nothing in common but a bucket."""
    shared = {"objects": s3.url(tmp_path.name)}
    with (
        serving(loaded, make_settings(checkpoint, videos=tmp_path / "one", **shared)) as one,
        serving(loaded, make_settings(checkpoint, videos=tmp_path / "two", **shared)) as two,
    ):
        yield one, two


def path_of(reply: Any) -> str:
    url: str = reply.json()["data"][0]["url"]
    return url[url.index("/files/") :]


def test_one_server_answers_for_another_s_pictures(pair: tuple[House, House]) -> None:
    """Half of all linked pictures were 404 behind a balancer."""
    one, two = pair
    path = path_of(one.draw(seed=1, response_format="url"))
    first, second = one.client.get(path), two.client.get(path)
    assert first.content == second.content and len(first.content) > 100
    assert first.headers["etag"] == second.headers["etag"] and second.headers["content-type"] == "image/png"
    assert two.client.get(path, headers={"If-None-Match": first.headers["etag"]}).status_code == 304
    part = two.client.get(path, headers={"Range": "bytes=-4"})
    assert part.status_code == 206 and part.content == first.content[-4:]
    assert part.headers["content-range"].endswith(f"-{len(first.content) - 1}/{len(first.content)}")
    head = two.client.head(path, headers={"Range": "bytes=-4"})
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(first.content)))
    changed = two.client.get(path, headers={"Range": "bytes=-4", "If-Range": '"another"'})
    assert changed.status_code == 200 and changed.content == first.content
    two.service.objects.remove(f"pictures/{path.rpartition('/')[2]}")
    assert error_of(one.client.get(path)) == (404, None, "not_found")


def test_links_of_the_bucket_itself_are_given_where_they_are_wanted(
    loaded: DeviceModel, checkpoint: Path, s3: S3Server, tmp_path: Path
) -> None:
    signed = make_settings(checkpoint, videos=tmp_path, objects=s3.url(tmp_path.name), presigned_seconds=60)
    with serving(loaded, signed) as house:
        path = path_of(house.draw(seed=1, response_format="url", output_format="webp"))
        told = house.client.get(path)
        assert told.status_code == 307 and told.headers["location"].startswith(s3.endpoint)
        fetched = house.client.get(path, headers={"Range": "bytes=0-3"}, follow_redirects=True)
        assert fetched.status_code == 206 and fetched.content == b"RIFF"
        assert house.client.get(path, follow_redirects=True).headers["content-type"] == "image/webp"
        assert house.client.head(path, follow_redirects=True).status_code == 200
        assert house.client.get(path[:-9] + "none.webp").status_code == 404, "in the one error shape"


def test_a_film_that_is_removed_between_lookup_and_sending_is_not_there(
    film_model: DeviceModel, film_settings: ServerSettings
) -> None:
    """It was a 500."""
    with serving(film_model, film_settings) as house:
        job = ended(house, post(house))
        url = f"{FILMS}/{job['id']}/content"
        assert house.client.get(url, headers={"Range": "bytes=0-1,4-5"}).status_code == 200, "lists are ignored"
        house.service.objects.remove(film_object(job["id"], "video.mp4"))
        assert error_of(house.client.get(url)) == (404, None, "not_found")
        assert house.client.get(url, params={"variant": "thumbnail"}).status_code == 200


@contextmanager
def held(server: S3Server) -> Iterator[None]:
    """A store that takes connections and answers nothing."""
    server.hold(True)
    try:
        yield
    finally:
        server.hold(False)


def unavailable(reply: Any) -> None:
    assert error_of(reply) == (503, None, "storage_unavailable")
    assert 5 <= int(reply.headers["retry-after"]) <= 10
    assert "does not answer in time" in reply.json()["error"]["message"]


def test_a_store_that_is_away_costs_no_film(
    film_model: DeviceModel, film_settings: ServerSettings, s3: S3Server, tmp_path: Path
) -> None:
    bucket = film_settings.model_copy(update={"objects": s3.url(tmp_path.name, timeout="0.3")})
    with serving(film_model, bucket) as house:
        before = ended(house, post(house, seed=1))
        url = f"{FILMS}/{before['id']}"
        with held(s3):
            unavailable(house.client.get(f"{url}/content"))
            unavailable(house.client.delete(url))
            assert house.client.get(url).json()["status"] == "completed", "it is still there"
            waiting = post(house, seed=1)
            house.until(lambda: house.metric("rmd_pictures_total") == 2, "its last step")
            assert house.client.get(f"{FILMS}/{waiting['id']}").json()["status"] == "in_progress"
        made = ended(house, waiting)
        assert made["status"] == "completed"
        contents = [house.client.get(f"{FILMS}/{job['id']}/content").content for job in (before, made)]
        assert contents[0] == contents[1]


def test_a_store_that_is_away_is_a_503_of_what_needs_it(
    loaded: DeviceModel, checkpoint: Path, s3: S3Server, tmp_path: Path
) -> None:
    settings = make_settings(checkpoint, videos=tmp_path, objects=s3.url(tmp_path.name, timeout="0.3"))
    with serving(loaded, settings) as house:
        path = path_of(house.draw(response_format="url"))
        with held(s3):
            unavailable(house.client.get(path))
            unavailable(house.draw(response_format="url"))
            assert house.draw().status_code == 200 and house.client.get("/health/ready").status_code == 200
        assert house.client.get(path).status_code == 200


def test_a_server_without_its_store_ends_with_one_line(checkpoint: Path, s3: S3Server, tmp_path: Path) -> None:
    """And does not load its models first. The credentials are in the environment."""
    nowhere = f"s3://films?endpoint=http://127.0.0.1:{free_ports(1)[0]}"
    failures = list[str]()
    settings = make_settings(checkpoint, videos=tmp_path, objects=nowhere)
    service = Service(settings, open_jobs, [], on_failed=failures.append)
    service.start()
    service.stop()
    assert failures == [f"the store {nowhere} cannot be used: it cannot be reached (objects)"]


def test_presigned_links_need_a_bucket(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="presigned_seconds: a folder has no links"):
        ServerSettings(presigned_seconds=60, objects=str(tmp_path))
