"""An S3 server that ends as in a power cut, while films are written to it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from server.objects.store import Objects, StoreError
from tests.server.test_objects import content, head
from tests.server.weed import S3Server


def test_a_bucket_whose_server_is_killed_while_it_writes_has_a_whole_object_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = S3Server(tmp_path / "s3")
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    objects = Objects(s3.url("killed"))
    objects.check()
    kept, failed = list[str](), list[str]()

    def write() -> None:
        for turn in range(1000):
            try:
                objects.put(f"film-{turn}", bytes([turn % 251]) * 4_000_000)
                kept.append(f"film-{turn}")
            except StoreError:
                failed.append(f"film-{turn}")
                return

    writer = threading.Thread(target=write)
    writer.start()
    while len(kept) < 3:
        assert writer.is_alive()
    s3.kill()
    writer.join(60)
    s3.start()
    for name in kept:
        found = content(objects, name)
        assert len(found) == 4_000_000 and len(set(found)) == 1
    with pytest.raises(FileNotFoundError):
        head(objects, failed[0])
    s3.kill()
