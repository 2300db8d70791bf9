"""A server whose engine runs two batches at a time: the same pictures, and nobody pays for another."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmd.size import Size
from server.core.messages import Began, Ended
from server.core.stations import StationKey
from server.device.door import Door
from server.device.engine import Engine
from server.device.model import DeviceModel
from server.front.engine import Doorway
from tests.server.conftest import FixedCosts, make_settings
from tests.server.house import House, pixels, serving

CROWD = 40


def long_enough(engine: Engine, least: int) -> bool:
    return engine._most_tracks > 1 and engine._loop.crowded(least)


@pytest.fixture
def tracked(checkpoint: Path, model: DeviceModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    """Its networks are eager, which two threads may run as well; engines in streams say so for themselves."""
    monkeypatch.setattr(Engine, "_takes_tracks", long_enough)
    with serving(model, make_settings(checkpoint, tracks=2)) as house:
        yield house


class Meeting:
    """Waits in the first calls of two threads until both are there."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._both = threading.Barrier(2)

    def __call__(self, component: str, size: Size | None, inputs: Any) -> None:
        name = threading.current_thread().name
        if name.startswith("track") and name not in self.names:
            self.names.add(name)
            self._both.wait(30)


def drawn(house: House, count: int = CROWD) -> list[bytes]:
    """Pictures asked for at once, while the device is held."""
    house.gate.close()
    calls = [house.in_background(lambda seed=seed: house.draw(f"prompt {seed}", seed=seed)) for seed in range(count)]
    house.until_waiting(count)
    house.gate.open()
    replies = [call.result(60) for call in calls]
    assert [reply.status_code for reply in replies] == [200] * count
    return [base64.b64decode(reply.json()["data"][0]["b64_json"]) for reply in replies]


def test_a_crowd_is_served_by_two_batches_at_a_time(tracked: House) -> None:
    meeting = tracked.gate.before = Meeting()
    together = drawn(tracked)
    assert len(meeting.names) == 2, "both ran at the same time"
    assert tracked.metric("rmd_pictures_total") == CROWD
    assert tracked.metric("rmd_device_busy_seconds_total") > 0
    tracked.gate.before = lambda *_: None
    for seed in (0, 7, CROWD - 1):
        alone = tracked.draw(f"prompt {seed}", seed=seed).json()
        # To the level, and not to the byte: eager products are the library's, which rounds by the rows' number.
        apart = pixels(alone["data"][0]["b64_json"]) - pixels(together[seed])
        assert np.abs(apart).max() <= 1 and np.count_nonzero(apart) < 0.001 * apart.size
        assert all(stage["batch_sizes"] == [1, 1] for stage in alone["rmd"]["stages"])


@pytest.fixture
def row_by_row(model: DeviceModel) -> DeviceModel:
    """Batches of one row alone, so that the library has no shapes to choose by."""
    return replace(model, costs=FixedCosts({key: {1: 0.010} for key in model.card.stations()}))


def test_a_track_does_not_change_a_bit(
    checkpoint: Path, row_by_row: DeviceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "_takes_tracks", long_enough)
    with serving(row_by_row, make_settings(checkpoint, tracks=2)) as house:
        meeting = house.gate.before = Meeting()
        together = drawn(house)
        assert len(meeting.names) == 2, "both ran at the same time"
        house.gate.before = lambda *_: None
        for seed in (0, 7, CROWD - 1):
            alone = house.draw(f"prompt {seed}", seed=seed).json()
            assert base64.b64decode(alone["data"][0]["b64_json"]) == together[seed]


def test_a_batch_that_raises_on_a_track_costs_nobody_a_picture(tracked: House) -> None:
    raised: list[str] = []

    def once_a_track(component: str, size: Size | None, inputs: Any) -> None:
        name = threading.current_thread().name
        if component == "denoiser" and name.startswith("track") and name not in raised:
            raised.append(name)
            raise RuntimeError("not this time")

    tracked.gate.before = once_a_track
    drawn(tracked)
    assert raised and tracked.metric("rmd_retried_batches_total") == len(raised)


def test_a_client_that_leaves_a_crowd_takes_its_picture_along(tracked: House) -> None:
    tracked.gate.close()
    connections = [tracked.send(prompt=f"gone {seed}", seed=seed) for seed in range(CROWD)]
    tracked.until_waiting(CROWD)
    for connection in connections[::2]:
        connection.close()
    tracked.gate.open()
    for connection in connections[1::2]:
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
        connection.close()
    tracked.until_idle()
    assert tracked.draw("after", seed=1).status_code == 200


def test_an_engine_writes_down_all_that_it_runs() -> None:
    doorway = Doorway()
    door = Door(doorway.address)
    try:
        key = StationKey("denoise", size=Size.square(32))
        first, second = (Began(number, key, ((f"r{number}", 0),), ("p",), 0.1) for number in (1, 2))
        assert doorway.last_batches() == ()
        door.send(first)
        door.send(second)
        assert doorway.last_batches() == (first, second)
        door.send(Ended(1, key, 1, 1, 0.1, ()))
        assert doorway.last_batches() == (second,)
        door.send(Ended(2, key, 1, 1, 0.1, ()))
        assert doorway.last_batches() == ()
    finally:
        door.close()
        doorway.close()
