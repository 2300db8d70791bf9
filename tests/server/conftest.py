"""One tiny model for the whole folder, one ordinary server for the tests that need nothing special."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from rmd.backbones.tiny import tiny_cascades, write_tiny_folder
from rmd.cascade_file import write_cascade_json
from rmd.checkpoint import TeacherSpec
from server.core.costs import CostTable
from server.core.stations import StationKey
from server.device.loading import load_model
from server.device.model import DeviceModel
from server.films import database as database_module
from server.films.database import Database
from server.front.engine import engine_settings
from server.start.settings import ServerSettings
from tests.server.film_desk import Desk
from tests.server.house import House, serving
from tests.server.postgresql import PostgreSQL, started
from tests.server.weed import S3Server

TEACHER_STEPS = 6
_FOLDER = tempfile.TemporaryDirectory(prefix="rmd-tests-")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A real S3 server, and its credentials in the environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete SD3-class folder with random weights; its teacher is the same network, guided, in a few steps."""
    torch.set_num_threads(1)
    folder = write_tiny_folder("sd3", tmp_path_factory.mktemp("checkpoints") / "tiny")
    write_cascade_json(
        folder,
        backbone="sd3",
        cascades=tiny_cascades("sd3"),
        default="2+2",
        teacher=TeacherSpec(TEACHER_STEPS, 4.5, 3.0, folder="."),
    )
    return folder


def make_settings(checkpoint: Path | tuple[Path, ...], **changes: object) -> ServerSettings:
    plain = {"checkpoint": checkpoint, "backend": "eager", "dtype": "float32", "port": 0, "log_level": "warning"}
    records = {"videos": Path(tempfile.mkdtemp(dir=_FOLDER.name)) / "videos"}  # each server's own
    return ServerSettings.model_validate({**plain, **records, "drain_seconds": 10, **changes})


def load_on_cpu(settings: ServerSettings) -> DeviceModel:
    return load_model(engine_settings(settings, "cpu", "nowhere"), lambda done, total, what: None)


@pytest.fixture(scope="session")
def loaded(checkpoint: Path) -> DeviceModel:
    return load_on_cpu(make_settings(checkpoint, max_batch=2))


class FixedCosts(CostTable):
    """Costs that no batch changes: a tiny network's real batches cost nothing like those of the table."""

    def observe(self, key: StationKey, rows: int, seconds: float) -> None:
        """Learn nothing."""


@pytest.fixture
def model(loaded: DeviceModel) -> DeviceModel:
    """The model with fixed costs and a steady baseline, so that nothing hangs on the machine or what else it is doing.

    Encoding, decoding and the low size gain from batches; the full size does not.
    """
    wide, narrow = {1: 0.010, 2: 0.011, 4: 0.012, 8: 0.0125}, {1: 0.010, 2: 0.020, 4: 0.040}
    full = max(loaded.card.sizes)
    costs = FixedCosts(
        {key: narrow if key.kind == "denoise" and key.size == full else wide for key in loaded.card.stations()}
    )
    return steady(loaded, costs)


def steady(loaded: DeviceModel, costs: CostTable) -> DeviceModel:
    """A model whose baseline can be told, and is not timed again."""
    (timed,) = loaded.card.baselines
    card = replace(loaded.card, baselines=(structs.replace(timed, spread=1.0),))
    return replace(loaded, card=card, costs=costs, teacher=None)


@pytest.fixture
def house(checkpoint: Path, model: DeviceModel) -> Iterator[House]:
    with serving(model, make_settings(checkpoint)) as running:
        yield running


@pytest.fixture(scope="session")
def loaded_films(film_checkpoint: Path) -> DeviceModel:
    """Tiny random Wan networks; their teacher is the same network, guided, in a few steps."""
    torch.set_num_threads(1)
    return load_on_cpu(make_settings(film_checkpoint, max_batch=2))


@pytest.fixture(scope="session")
def film_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_folder("wan-1.3b", tmp_path_factory.mktemp("films") / "tiny-wan")
    teacher = TeacherSpec(4, 5.0, 5.0, folder=".")
    cascades = tiny_cascades("wan-1.3b")
    write_cascade_json(folder, backbone="wan-1.3b", cascades=cascades, default=next(iter(cascades)), teacher=teacher)
    return folder


@pytest.fixture
def film_model(loaded_films: DeviceModel) -> DeviceModel:
    """The film model as it was loaded, whatever earlier tests have taught it."""
    return steady(loaded_films, CostTable(loaded_films.costs.table()))


@pytest.fixture
def film_settings(tmp_path: Path) -> ServerSettings:
    return make_settings(Path("tiny-wan"), videos=tmp_path / "videos")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A real PostgreSQL of this process's tests."""
    with started() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite3'}"
    server: PostgreSQL = request.getfixturevalue("postgresql")
    return server.new_database()


@pytest.fixture
def open_database(database_url: str) -> Iterator[Callable[[], Database]]:
    opened: list[Database] = []

    def once_more() -> Database:
        opened.append(Database(database_url))
        return opened[-1]

    yield once_more
    for each in opened:
        each.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite waits for a lock, and the server for a database that is away, as long as a test may."""
    monkeypatch.setattr(database_module, "_BUSY_SECONDS", 0.1)
    monkeypatch.setattr(database_module, "_RETRY_SECONDS", 0.1)


@pytest.fixture
def desks(tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    opened: list[Desk] = []

    def open_desk(**limits: Any) -> Desk:
        opened.append(Desk(tmp_path, **limits))
        return opened[-1]

    yield open_desk
    for desk in opened:
        desk.runner.stop()
        desk.database.close()
