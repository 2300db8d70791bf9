"""One tiny model for the whole folder, one ordinary server for the tests that need nothing special."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rmd.backbones.tiny import tiny_cascades, write_tiny_folder
from rmd.checkpoint import TeacherSpec, write_cascade_json
from server.core.latency import LatencyTable
from server.device.model import ServedModel
from server.start.loading import load_model
from server.start.settings import ServerSettings
from tests.server.house import House, serving

TEACHER_STEPS = 6


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


def make_settings(checkpoint: Path, **changes: object) -> ServerSettings:
    plain = {"checkpoint": checkpoint, "backend": "eager", "dtype": "float32", "port": 0, "log_level": "warning"}
    return ServerSettings.model_validate({**plain, "drain_seconds": 10, **changes})


@pytest.fixture(scope="session")
def loaded(checkpoint: Path) -> ServedModel:
    return load_model(make_settings(checkpoint, max_batch=2), lambda progress: None)


@pytest.fixture
def model(loaded: ServedModel) -> ServedModel:
    """The model with fixed latencies, so that batch widths do not hang on what else the machine is doing.

    Encoding, decoding and the low size gain from batches; the full size does not.
    """
    wide, narrow = {1: 0.010, 2: 0.011, 4: 0.012, 8: 0.0125}, {1: 0.010, 2: 0.020, 4: 0.040}
    full = max(loaded.sizes)
    loaded.latencies = LatencyTable(
        {key: narrow if key.kind == "denoise" and key.size == full else wide for key in loaded.stations()}
    )
    return loaded


@pytest.fixture
def house(checkpoint: Path, model: ServedModel) -> Iterator[House]:
    with serving(model, make_settings(checkpoint)) as running:
        yield running


@pytest.fixture(scope="session")
def film_model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """Tiny random Wan networks; their teacher is the same network, guided, in a few steps."""
    torch.set_num_threads(1)
    folder = write_tiny_folder("wan-1.3b", tmp_path_factory.mktemp("films") / "tiny-wan")
    teacher = TeacherSpec(4, 5.0, 5.0, folder=".")
    cascades = tiny_cascades("wan-1.3b")
    write_cascade_json(folder, backbone="wan-1.3b", cascades=cascades, default=next(iter(cascades)), teacher=teacher)
    return load_model(make_settings(folder, max_batch=2), lambda progress: None)


@pytest.fixture
def film_settings(tmp_path: Path) -> ServerSettings:
    return make_settings(Path("tiny-wan"), videos=tmp_path / "videos")
