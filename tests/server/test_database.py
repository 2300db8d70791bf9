"""The database itself: migrated or refused at start, and what its faults do to a server that runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, make_url, select, text, update
from sqlalchemy.exc import DataError, SQLAlchemyError

from server.device.model import DeviceModel
from server.films import database as database_module
from server.films.database import Database, DatabaseError
from server.films.schema import VERSION_TABLE
from server.films.store import JobStore
from server.films.tables import Base, VideoJob
from server.start.settings import ServerSettings
from tests.server.house import House, serving
from tests.server.postgresql import PostgreSQL
from tests.server.test_jobs import job

URL = "/v1/videos"
BEFORE = (Path(__file__).parent / "jobs_before_migrations.sql").read_text()
"""Three jobs, one of each kind, as servers of before the migrations left them."""


def run_sql(url: str, script: str) -> None:
    """On a database that no server has opened."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        with sqlite3.connect(str(parsed.database)) as connection:
            connection.executescript(script)
        connection.close()
        return
    script = script.replace("number INTEGER", "number SERIAL").replace(" DOUBLE", " DOUBLE PRECISION")
    engine = create_engine(parsed.set(drivername="postgresql+psycopg"))
    with engine.begin() as begun:
        for statement in script.split(";\n"):
            if statement.strip():
                begun.exec_driver_sql(statement)
        if "INSERT" in script:  # numbers were given, so the sequence does not know of them
            begun.exec_driver_sql("SELECT setval('videos_number_seq', 3)")
    engine.dispose()


# -- at start ----------------------------------------------------------------------------------------------------------


def test_the_migrations_make_what_the_server_declares(open_database: Callable[[], Database]) -> None:
    with open_database()._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, Base.metadata) == []


def test_jobs_of_before_the_migrations_go_on(open_database: Callable[[], Database], database_url: str) -> None:
    run_sql(database_url, BEFORE)
    store = JobStore(open_database())
    newest, begun, done = store.page("", None, 9, newest_first=True).jobs
    assert (done.status, done.report, done.bytes, done.left) == ("completed", {"schedule": "3+3"}, 18, True)
    assert (begun.status, begun.progress, newest.request["prompt"]) == ("in_progress", 40, "an owl's nest")
    claimed = [store.claim(["m"], "new", 60) for _ in range(3)]
    assert [each and (each.id, each.attempts) for each in claimed] == [(begun.id, 1), (newest.id, 0), None]
    keyed = store.add(job("m"))
    assert JobStore(open_database()).get("", keyed.id) is not None, "opened again, nothing is left to be done"


def test_several_servers_may_start_at_once(open_database: Callable[[], Database], database_url: str) -> None:
    run_sql(database_url, BEFORE)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_database(), range(4)))
    assert {len(JobStore(each).page("", None, 9, False).jobs) for each in opened} == {3}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            f"CREATE TABLE {VERSION_TABLE} (version_num VARCHAR(32)); INSERT INTO {VERSION_TABLE} VALUES ('9999')",
            "9999",
        ),
        ("ALTER TABLE videos DROP COLUMN report", "videos has no column report"),
        ("ALTER TABLE videos DROP COLUMN account; CREATE TABLE others (x INTEGER)", "videos has no column account"),
    ],
)
def test_another_schema_is_refused_and_left_as_it_was(database_url: str, change: str, reason: str) -> None:
    before = BEFORE.replace("CREATE INDEX ix_videos_account ON videos (account);\n", "")
    run_sql(database_url, before + change.replace("; ", ";\n"))
    for _ in range(2):  # the second time too: nothing was migrated halfway
        with pytest.raises(ValueError, match=reason) as refused:
            Database(database_url)
        told = str(refused.value)
        assert "\n" not in told and "secret" not in told and str(make_url(database_url).database) in told


def test_a_damaged_file_is_refused_with_its_path(tmp_path: Path) -> None:
    file = tmp_path / "jobs.sqlite3"
    opened = Database(f"sqlite:///{file}")
    store = JobStore(opened)
    for _ in range(40):
        store.add(job("m"))
    opened.close()
    whole = bytearray(file.read_bytes())
    root = sqlite3.connect(file).execute("SELECT rootpage FROM sqlite_master WHERE name = 'videos'").fetchone()[0]
    file.write_bytes(whole[: 4096 * (root - 1)] + os.urandom(4096) + whole[4096 * root :])
    with pytest.raises(ValueError, match=f"{file} cannot be used: it is damaged"):
        Database(f"sqlite:///{file}")
    file.write_bytes(b"no database, but a text that somebody keeps here" * 99)
    with pytest.raises(ValueError, match=f"{file} cannot be used: it is damaged"):
        Database(f"sqlite:///{file}")


def test_what_is_no_place_for_a_database_is_named_without_a_password(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for url, reason in (
        (f"sqlite:///{tmp_path}/folder", f"{tmp_path}/folder cannot be used: there is a folder"),
        (f"sqlite:///{tmp_path}/file/x.sqlite3", f"{tmp_path}/file"),
        ("nonsense", "video_database is no URL"),
        ("nosuch://user:secret@host/db", "of nosuch; SQLite and PostgreSQL"),
        (
            "postgresql://user:secret@127.0.0.1:1/db?password=secret",
            "127.0.0.1:1/db cannot be used: it cannot be reach",
        ),
    ):
        with pytest.raises(ValueError, match=reason) as raised:
            Database(url)
        assert "secret" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["\0", "video_\0", "\ud800", "\n", "vidéo"])
def test_a_name_that_no_job_can_have_is_nobody_s_and_no_fault(open_database: Callable[[], Database], name: str) -> None:
    """PostgreSQL takes no NUL in a text: one GET of /v1/videos/%00 took the server's readiness."""
    database = open_database()
    store = JobStore(database)
    assert store.get("", name) is None
    with pytest.raises(KeyError):
        store.page("", name, 9, newest_first=True)
    assert database.fault is None
    asked = job("m")
    asked.request = {"prompt": "a\0 red rocket"}
    kept = store.add(asked)
    found = store.get("", kept.id)
    assert found is not None and found.request["prompt"] == "a\0 red rocket", "a prompt may hold what a name may not"


def test_work_that_no_database_would_do_is_no_fault_of_this_one(open_database: Callable[[], Database]) -> None:
    """One value that it does not take, or one mistaken statement, made the server unready for everybody."""
    database = open_database()
    with pytest.raises(SQLAlchemyError), database.begin() as session:
        session.execute(text("SELECT :missing"))
    with contextlib.suppress(DataError), database.begin() as session:  # SQLite takes it
        session.execute(text("SELECT CAST(:name AS TEXT)"), {"name": "\0"})
    assert database.fault is None


# -- PostgreSQL --------------------------------------------------------------------------------------------------------


def test_each_job_is_claimed_once_however_many_claim(open_database: Callable[[], Database]) -> None:
    store = JobStore(open_database())
    for _ in range(24):
        store.add(job("m"))

    def drain(worker: int) -> list[str]:
        return [taken.id for taken in iter(lambda: store.claim(["m"], str(worker), 60), None)]

    with ThreadPoolExecutor(4) as pool:
        taken = [each for found in pool.map(drain, range(4)) for each in found]
    assert len(taken) == len(set(taken)) == 24


def test_a_claim_does_not_wait_for_a_row_that_another_is_taking(postgresql: PostgreSQL) -> None:
    database = Database(postgresql.new_database())
    store = JobStore(database)
    first, second = store.add(job("m")), store.add(job("m"))
    with database.begin() as other:
        other.get(VideoJob, first.number, with_for_update=True)
        taken = store.claim(["m"], "b", 60)
    assert taken is not None and taken.id == second.id
    database.close()


def test_idle_workers_are_woken_by_postgresql(postgresql: PostgreSQL) -> None:
    url = postgresql.new_database()
    mine, other, woken = Database(url), Database(url), threading.Semaphore(0)
    JobStore(mine).listen(woken.release)
    assert woken.acquire(timeout=20), "it listens"
    JobStore(other).add(job("m"))
    assert woken.acquire(timeout=20)
    mine.close()
    other.close()


def test_films_wait_for_a_postgresql_that_went_away(
    film_model: DeviceModel, film_settings: ServerSettings, postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_PROBE_SECONDS", 0.2)
    monkeypatch.setattr(database_module, "_RETRY_SECONDS", 0.1)
    settings = ServerSettings.model_validate(
        {**film_settings.model_dump(), "video_database": postgresql.new_database()}
    )
    with serving(film_model, settings) as house:
        house.gate.close()
        made = house.client.post(URL, json={"prompt": "x"}).json()
        assert house.gate.arrived.wait(30)
        postgresql.stop()
        try:
            house.gate.open()
            unavailable(house, "it cannot be reached")
        finally:
            postgresql.start()
        house.until(lambda: house.client.get("/health/ready").status_code == 200, "ready again")
        house.until(lambda: status(house, made) == "completed", "its film")


def test_a_postgresql_that_hangs_is_away_and_comes_back(
    postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests waited for ever, each on a thread."""
    monkeypatch.setattr("server.films.bounded._GRACE_SECONDS", 0.2)
    # libpq's shortest; a statement may take the server a second
    database = Database(f"{postgresql.new_database()}?connect_timeout=2&options=-c%20statement_timeout%3D1s")
    store = JobStore(database)
    kept = store.add(job("m"))
    with ThreadPoolExecutor(2) as pool:
        with postgresql.hanging():
            asked = [pool.submit(store.get, "", kept.id) for _ in range(2)]
            faults = [each.exception(20) for each in asked]
            assert [type(each) for each in faults] == [DatabaseError] * 2 and database.fault == "it cannot be reached"
        database.probe()
        assert database.fault is None and store.get("", kept.id) is not None
    database.close()


def test_a_statement_that_postgresql_does_not_finish_changes_nothing(
    postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.films.bounded._GRACE_SECONDS", 0.2)
    database = Database(f"{postgresql.new_database()}?connect_timeout=2&options=-c%20statement_timeout%3D1s")
    store = JobStore(database)
    kept, changed, hangs = store.add(job("m")), threading.Event(), threading.Event()

    def change() -> None:
        with database.begin() as session:
            session.execute(update(VideoJob).values(progress=50))
            changed.set()
            assert hangs.wait(20)
            session.execute(select(VideoJob))

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(change)
        assert changed.wait(20)
        with postgresql.hanging():
            hangs.set()
            fault = asked.exception(20)
        assert isinstance(fault, DatabaseError) and fault.reason == "it cannot be reached"
    found = store.get("", kept.id)
    assert found is not None and found.progress == 0
    database.close()


def status(house: House, made: dict[str, Any]) -> str:
    return str(house.client.get(f"{URL}/{made['id']}").json()["status"])


def unavailable(house: House, reason: str) -> None:
    """Films are 503 with the reason, the server is not ready and says why; what needs no database goes on."""
    reply = house.client.post(URL, json={"prompt": "x"})
    assert reply.status_code == 503 and int(reply.headers["Retry-After"]) > 0, reply.text
    assert reply.json()["error"]["code"] == "database_unavailable" and reason in reply.json()["error"]["message"]
    ready = house.client.get("/health/ready")
    assert ready.status_code == 503 and reason in ready.json()["database"]
    assert ready.json()["status"] == "unavailable" and reason in ready.json()["reason"]
    assert house.client.get("/health/live").status_code == 200 and house.metric("rmd_ready") == 0


# -- SQLite, while it is used ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_films_wait_for_a_locked_database(film_model: DeviceModel, film_settings: ServerSettings) -> None:
    with serving(film_model, film_settings) as house:
        house.gate.close()
        made = house.client.post(URL, json={"prompt": "x"}).json()
        assert house.gate.arrived.wait(30)
        other = sqlite3.connect(film_settings.videos / "jobs.sqlite3", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        house.gate.open()
        unavailable(house, "it is locked")
        other.rollback()
        other.close()
        house.until(lambda: house.client.get("/health/ready").status_code == 200, "ready again")
        house.until(lambda: status(house, made) == "completed", "its film")


@pytest.mark.usefixtures("quick")
def test_a_database_that_was_removed_takes_no_jobs(film_model: DeviceModel, film_settings: ServerSettings) -> None:
    with serving(film_model, film_settings) as house:
        (film_settings.videos / "jobs.sqlite3").unlink()
        unavailable(house, "its file was removed or replaced")


@pytest.mark.usefixtures("quick")
def test_a_file_that_was_damaged_while_it_is_used_is_away_until_all_of_it_is_whole(tmp_path: Path) -> None:
    """It read as ready again a second later, and every request failed."""
    file = tmp_path / "jobs.sqlite3"
    opened = Database(f"sqlite:///{file}")
    store = JobStore(opened)
    for _ in range(40):
        store.add(job("m"))
    with sqlite3.connect(file, isolation_level=None) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        page = other.execute("SELECT rootpage FROM sqlite_master WHERE name = 'videos'").fetchone()[0]
        whole = write_page(file, page, os.urandom(4096))
        other.execute(f"UPDATE {VERSION_TABLE} SET version_num = version_num")  # nobody trusts what he remembers
        with pytest.raises(DatabaseError, match="it is damaged"):
            store.counts(["m"])
        opened.probe()
        assert opened.fault == "it is damaged"
        other.execute("BEGIN IMMEDIATE")
        opened.probe()
        other.execute("ROLLBACK")
        opened.probe()
        assert opened.fault == "it is damaged", "however it failed meanwhile"
        write_page(file, page, whole)
        opened.probe()
        assert opened.fault is None and store.counts(["m"])["queued"] == 40
    other.close()
    opened.close()


def write_page(file: Path, page: int, content: bytes) -> bytes:
    """Change a page behind SQLite's back; returns what it held."""
    with file.open("r+b") as raw:
        raw.seek(4096 * (page - 1))
        before = raw.read(4096)
        raw.seek(4096 * (page - 1))
        raw.write(content)
    return before


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted by root only")
def test_a_full_disk_is_refused_at_start_and_told_while_running(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        opened = Database(f"sqlite:///{disk / 'jobs.sqlite3'}")
        store = JobStore(opened)
        kept = store.add(job("m"))
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(10**6))
        with pytest.raises(DatabaseError, match=r"its disk (is full|failed)"):
            for _ in range(100):
                store.add(job("m"))
        opened.probe()
        assert opened.fault is not None and store.get("", kept.id) is not None
        with pytest.raises(ValueError, match=r"its disk (is full|failed)"):
            Database(f"sqlite:///{disk / 'jobs.sqlite3'}")
        filler.unlink()
        opened.probe()
        assert opened.fault is None and store.add(job("m"))
        opened.close()
    finally:
        subprocess.run(["umount", "-l", disk], check=False)
        shutil.rmtree(disk, ignore_errors=True)


# -- idempotency -------------------------------------------------------------------------------------------------------


def test_a_key_makes_one_film_on_however_many_servers_and_after_a_restart(
    film_model: DeviceModel, film_settings: ServerSettings
) -> None:
    headers = {"Idempotency-Key": "k"}
    with serving(film_model, film_settings) as house:
        first = house.client.post(URL, json={"prompt": "x"}, headers=headers).json()
    with serving(film_model, film_settings) as house:
        again = house.client.post(URL, json={"prompt": "x"}, headers=headers)
        assert again.json()["id"] == first["id"] and again.headers["Idempotent-Replayed"] == "true"
        other = house.client.post(URL, json={"prompt": "y"}, headers=headers)
        assert other.status_code == 409 and other.json()["error"]["code"] == "idempotency_key_reused"
        assert len(house.client.get(URL).json()["data"]) == 1


def test_a_key_of_racing_requests_makes_one_job_and_is_free_once_that_is_gone(
    open_database: Callable[[], Database],
) -> None:
    stores = [JobStore(open_database()) for _ in range(2)]

    def new(account: str = "") -> VideoJob:
        asked = job("m", account)
        asked.idempotency_key, asked.body_digest = "k", "d"
        return asked

    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda store: store.add(new()).id, stores * 2))
    assert len(made) == 1
    (first,) = made
    assert stores[0].add(new("another")).id != first, "keys of two accounts never meet"
    assert stores[0].cancel(first, 10.0, 20.0) and stores[0].add(new(), now=15.0).id == first
    later = stores[0].add(new(), now=25.0)
    assert later.id != first, "expired, though nobody has tidied up"
    stores[0].cancel(later.id, 26.0, 99.0)
    stores[0].delete(later.id)
    assert stores[0].add(new(), now=27.0).id != later.id, "deleted"
