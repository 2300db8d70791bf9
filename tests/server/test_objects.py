"""The store of objects: one contract over a folder and over a real S3 server, and what breaks in each."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.front.files import LinkedPictures
from server.objects.place import open_bucket, read_place
from server.objects.store import KeptObject, Objects, StoreError
from tests.server.house import Clock
from tests.server.weed import READER, READER_SECRET, S3Server, free_ports


@pytest.fixture(params=["folder", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    if request.param == "folder":
        return Objects(tmp_path / "objects")
    server: S3Server = request.getfixturevalue("s3")
    return Objects(server.url(tmp_path.name))


def head(objects: Objects, name: str) -> KeptObject:
    return asyncio.run(objects.head(name))


def content(objects: Objects, name: str) -> bytes:
    kept = head(objects, name)
    return asyncio.run(objects.read(kept, 0, kept.size))


# -- the contract ------------------------------------------------------------------------------------------------------


def test_what_was_put_is_there_whole_and_in_parts(objects: Objects) -> None:
    objects.check()
    objects.put("video_1/video.mp4", b"0123456789", "video/mp4")
    kept = head(objects, "video_1/video.mp4")
    assert kept.size == 10 and kept.etag.startswith('"') and abs(kept.modified.timestamp() - time.time()) < 60
    assert asyncio.run(objects.read(kept, 3, 6)) == b"345" and asyncio.run(objects.read(kept, 8, 99)) == b"89"


def test_what_is_not_there_is_not_found_and_may_be_removed(objects: Objects) -> None:
    with pytest.raises(FileNotFoundError):
        head(objects, "none/x")
    objects.remove("none/x")
    objects.put("some/x", b"1")
    kept = head(objects, "some/x")
    objects.remove("some/x")
    with pytest.raises(FileNotFoundError):
        asyncio.run(objects.read(kept, 0, 1))


def test_nobody_reads_halves_of_two(objects: Objects) -> None:
    objects.put("a/film", b"old old")
    old = head(objects, "a/film")
    objects.put("a/film", b"new one, longer")
    with pytest.raises(FileNotFoundError):
        asyncio.run(objects.read(old, 0, 3))
    assert content(objects, "a/film") == b"new one, longer"


def test_a_list_has_what_lies_below_a_name_and_no_more(objects: Objects) -> None:
    for name in ("pictures/b", "pictures/a", "picturesque", "video_1/x"):
        objects.put(name, name.encode())
    assert [(kept.name, kept.size) for kept in objects.under("pictures")] == [("pictures/a", 10), ("pictures/b", 10)]
    assert objects.under("nothing") == []


def test_linked_pictures_expire_and_stay_within_their_bytes_whichever_server_tidies_up(objects: Objects) -> None:
    clock = Clock()
    clock.now = 1000.0
    one, other = (LinkedPictures(objects, max_bytes=100, life_seconds=10, clock=clock) for _ in range(2))

    async def scenario() -> None:
        names = []
        for _ in range(3):
            clock.now += 1
            names += await one.put([bytes(40)], "image/png", "png")
        found = await other.find(names[0])
        assert found is not None and found[1] == pytest.approx(8) and one.stored_bytes == 120
        other.tidy()
        one.tidy()
        assert await one.find(names[0]) is None and await one.find(names[2]) is not None
        assert one.stored_bytes == other.stored_bytes == 80
        clock.now = 1012.5
        assert await one.find(names[1]) is None, "it has expired, though nobody has tidied up"
        forged = f"{int(2e6):012x}{names[1][12:]}"
        assert await one.find(forged) is None and await one.find("../jobs.sqlite3") is None
        other.tidy()
        assert [kept.name for kept in objects.under("pictures")] == [f"pictures/{names[2]}"]

    asyncio.run(scenario())


def test_what_is_put_while_somebody_tidies_up_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was forgotten, and what was too much stayed until the next look."""
    objects = Objects(tmp_path)
    pictures, under = LinkedPictures(objects, max_bytes=100, life_seconds=60), objects.under

    def put(size: int) -> None:
        asyncio.run(pictures.put([bytes(size)], "image/png", "png"))

    def listed(prefix: str) -> list[KeptObject]:
        found = under(prefix)
        put(70)
        return found

    put(50)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(objects, "under", listed)
        pictures.tidy()
    assert pictures.stored_bytes == 120
    pictures.tidy()
    assert pictures.stored_bytes == 70


# -- a folder ----------------------------------------------------------------------------------------------------------


def test_a_file_and_the_folders_that_name_it_are_on_the_disk_when_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files were brought to the disk and their names were not: a power cut lost a completed film."""
    objects, synced, real = Objects(tmp_path / "films"), list[str](), os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    objects.put("video_1/video.mp4", b"film")
    scratch, *folders = synced
    assert scratch.startswith(str(tmp_path / "films" / ".scratch"))
    assert folders == [str(tmp_path / "films" / "video_1"), str(tmp_path / "films")]


def test_a_writer_that_is_killed_leaves_a_whole_object_or_none(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from server.objects.store import Objects\n"
        "store = Objects(Path(sys.argv[1]))\n"
        "for turn in range(10**6): store.put('film', bytes([turn % 251]) * 3_000_000)"
    )
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", script, tmp_path])
        end = time.monotonic() + 60
        while not (tmp_path / "film").exists():
            assert time.monotonic() < end and writer.poll() is None
        writer.kill()
        writer.wait()
        found = content(Objects(tmp_path), "film")
        assert len(found) == 3_000_000 and len(set(found)) == 1
    left = list((tmp_path / ".scratch").iterdir())
    for file in left:
        os.utime(file, (time.time() - 7200,) * 2)
    Objects(tmp_path)
    assert not list((tmp_path / ".scratch").iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="it is full"):
        objects.put("a/film", b"x")
    assert not list((tmp_path / ".scratch").iterdir()) and not (tmp_path / "a").exists()


# -- a bucket ----------------------------------------------------------------------------------------------------------


def test_forbidden_credentials_are_told_without_them(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for key, secret in ((READER, READER_SECRET), ("rmd", "wrong-secret"), ("nobody", "wrong-secret")):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match="does not let this server") as raised:
            Objects(s3.url()).check()
        assert s3.endpoint in str(raised.value) and secret not in str(raised.value) + caplog.text


def test_a_store_that_is_away_or_silent_says_so(s3: S3Server) -> None:
    away = Objects(f"s3://films?endpoint=http://127.0.0.1:{free_ports(1)[0]}")
    for attempt in (lambda: away.put("x", b"1"), lambda: head(away, "x"), lambda: away.under("x")):
        with pytest.raises(StoreError, match="it cannot be reached") as raised:
            attempt()
        assert raised.value.fault.value.status == 503 and raised.value.retry_after in range(5, 11)
    silent = Objects(s3.url(timeout="0.3"))
    s3.hold(True)
    try:
        with pytest.raises(StoreError, match="it does not answer in time"):
            silent.put("x", b"1")
    finally:
        s3.hold(False)


# -- the setting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ftp://host/x", "no store that is known"),
        ("s3://", "bucket's name"),
        ("s3://key:secret@films", "holds no secrets"),
        ("s3://films?aws_secret_access_key=hush", "holds no secrets"),
        ("az://films?sas_token=hush", "holds no secrets"),
    ],
)
def test_a_place_that_is_none_or_holds_a_secret_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        read_place(text)
    assert "hush" not in str(raised.value) and "key:secret" not in str(raised.value)


def test_a_bucket_that_cannot_be_opened_says_why() -> None:
    with pytest.raises(ValueError, match="Account must be specified"):
        open_bucket("az://films")
    with pytest.raises(ValueError, match="nonsense"):
        open_bucket("s3://films?nonsense=1")
