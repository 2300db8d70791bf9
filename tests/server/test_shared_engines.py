"""Engines that several fronts share over TCP: the same bytes, strangers outside, engines and fronts that go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq
from msgspec import structs

from server.core.messages import Stop, Submit
from server.core.stages import parse_stages
from server.device.loading import load_model
from server.device.model import DeviceModel
from server.front.engine import engine_settings
from server.front.member import Health
from server.front.remote import KeyPair, RemoteEngine
from server.front.service import Service
from server.start.settings import ServerSettings
from tests.server.conftest import load_on_cpu, make_settings
from tests.server.house import Gate, House, pixels, serving
from tests.server.shared_engine import KEYS, SharedEngine, SharedEngineProcess, enlist, front, no_jobs
from tests.server.test_processes import draw_all, pictures


@pytest.fixture
def settings(checkpoint: Path) -> ServerSettings:
    quick = {"measure_teacher": False, "serve_teacher": False, "threads": 1}
    return make_settings(checkpoint, max_batch=1, build_missing=False, **quick)


@pytest.fixture
def gate(model: DeviceModel) -> Iterator[Gate]:
    inner = model.backbone.executor
    model.backbone.executor = gate = Gate(inner)
    yield gate
    gate.open()
    model.backbone.executor = inner


@pytest.fixture
def engine(model: DeviceModel, gate: Gate) -> Iterator[SharedEngine]:
    shared = SharedEngine(model)
    yield shared
    gate.open()
    shared.door.leave()
    shared.thread.join(30)
    assert not shared.thread.is_alive(), "it ends when it is told to leave"


def member(house: House, name: str) -> Any:
    return next(each for each in house.service.fleet.members if each.device == name)


def drawn(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["data"][0]["b64_json"])


def test_an_engine_killed_over_there_costs_no_request_and_bytes_stay(settings: ServerSettings) -> None:
    single = load_on_cpu(settings)
    with serving(single, settings) as local:
        undisturbed = pictures(draw_all(local, 12))
    killed = SharedEngineProcess(settings)
    survivor = SharedEngine(single)
    with front(settings, "front", killed=killed) as house:
        calls = house.in_background(lambda: draw_all(house, 12))
        house.until(lambda: house.metric("rmd_pictures_total") >= 2, "some of them done")
        assert house.service.fleet.work()["killed"] > 0, "and others not"
        killed.kill()
        enlist(house.service, "front", {"survivor": survivor})
        assert pictures(calls.result(90)) == undisturbed, "the same to the bit as of an engine of its own"
        assert house.metric("rmd_pictures_total") == len(undisturbed)
        house.until(
            lambda: [each.device for each in house.service.fleet.members] == ["survivor"], "the other forgotten"
        )
    survivor.door.leave()
    survivor.thread.join(30)


def test_strangers_are_not_let_in(engine: SharedEngine) -> None:
    for keys, contact in (
        (KeyPair(*zmq.curve_keypair()), engine.contact),
        (KEYS, engine.contact._replace(key=zmq.curve_keypair()[0].decode())),
    ):
        stranger = RemoteEngine(contact, keys, "stranger")
        while stranger.running:
            assert stranger.receive(0.01) is None, "it is told nothing"
        stranger.close()
    friend = RemoteEngine(engine.contact, KEYS, "friend")
    received = friend.receive(30)
    assert received is not None and type(received[0]).__name__ == "Ready"
    friend.send(Stop())
    friend.close()


def test_a_front_whose_keys_are_changed_is_let_in_again(engine: SharedEngine, settings: ServerSettings) -> None:
    service = Service(settings, no_jobs, starts=())
    service.start()
    enlist(service, "front", {"one": engine}, KeyPair(*zmq.curve_keypair()))
    while not (refused := list(service.fleet.members)) or not refused[0].reason:
        time.sleep(0.005)
    enlist(service, "front", {"one": engine})
    while not service.ready:
        time.sleep(0.005)
    service.stop()


def test_what_one_batch_gave_is_counted_once(engine: SharedEngine, gate: Gate, settings: ServerSettings) -> None:
    with front(settings, "left", one=engine) as left, front(settings, "right", one=engine) as right:
        gate.close()
        calls = [house.in_background(lambda h=house, s=s: h.draw(seed=s)) for s, house in enumerate([left, right] * 3)]
        left.until_waiting(3)
        right.until_waiting(3)
        gate.open()
        for seed, call in enumerate(calls):  # in other company: within rounding
            apart = pixels(drawn(call.result(60))) - pixels(drawn(left.draw(seed=seed)))
            assert abs(apart).max() <= 8 and abs(apart).mean() <= 1, "each front gets its own"
        steps = left.metric("rmd_steps_total") + right.metric("rmd_steps_total")
        assert steps == 12 * 4 and right.metric("rmd_steps_total") > 0
        left.until_idle()
        assert not engine.door._seats or all(not seat.work for seat in engine.door._seats.values())


def test_a_front_that_goes_takes_its_work_along(engine: SharedEngine, gate: Gate, settings: ServerSettings) -> None:
    gone = RemoteEngine(engine.contact, KEYS, "gone")
    with front(settings, "stays", one=engine) as stays:
        gate.close()
        first = stays.in_background(lambda: stays.draw(seed=1))
        assert gate.arrived.wait(30)
        work = stays.service.fleet._ledger.all()[0].work
        for number in range(20):
            gone.send(Submit(structs.replace(work, id=f"gone-{number}")))
        deadline = time.monotonic() + 30
        while gone.receive(0.0) is None:  # it has come in
            assert time.monotonic() < deadline
        gone.close()
        gate.open()
        assert drawn(first.result(60))
        drawn(stays.draw(seed=2))
        stays.until(lambda: len(engine.door._seats) == 1, "the other one is forgotten")
        runs = len(gate.calls)
        drawn(stays.draw(seed=3))
        assert len(gate.calls) == runs + 5, "four steps and the decoder (its text is kept): nobody else's are left"


def test_an_engine_that_leaves_finishes_its_work(model: DeviceModel, gate: Gate, settings: ServerSettings) -> None:
    leaves, stays = SharedEngine(model), SharedEngine(model)
    with front(settings, "front", leaves=leaves) as house:
        gate.close()
        calls = [house.in_background(lambda s=s: house.draw(seed=s, partial_images=1, stream=True)) for s in range(4)]
        house.until_waiting(4)
        leaves.door.leave()
        enlist(house.service, "front", {"stays": stays})
        house.until(lambda: member(house, "stays").health is Health.READY, "the other engine")
        gate.open()
        house.until(lambda: not leaves.thread.is_alive(), "its end")
        for call in calls:
            events = call.result(60).text
            assert "image_generation.completed" in events and "error" not in events
        assert all(generation.strikes == 0 for generation in house.service.fleet._ledger.all())
        assert drawn(house.draw(seed=1))
        house.until(lambda: [each.device for each in house.service.fleet.members] == ["stays"], "the other forgotten")
    stays.door.leave()
    stays.thread.join(30)


@pytest.mark.parametrize("layout", ["all", "low+high,decode"])
def test_what_is_served_stays_known_while_no_engine_is_named(settings: ServerSettings, layout: str) -> None:
    """As while a cluster puts another one in the place of the only one that died: models take minutes to load."""
    models = {stages: load_part(settings, stages) for stages in layout.split(",")}
    shared = {stages: SharedEngine(model) for stages, model in models.items()}
    last = list(shared)[-1]
    rest = {stages: engine for stages, engine in shared.items() if stages != last}
    with front(settings, "front", **shared) as house:
        house.until(lambda: house.service.ready, "all of them")
        told, picture = house.client.get("/v1/models").json()["data"][0]["id"], drawn(house.draw(seed=1))
        shared[last].door.leave()
        shared[last].thread.join(30)
        enlist(house.service, "front", rest)
        house.until(lambda: member(house, last).health is Health.DOWN, "its end")
        time.sleep(0.5)  # the fleet looks every 0.2 s
        assert house.client.get("/health/ready").status_code == 503
        assert house.client.get("/v1/models").json()["data"][0]["id"] == told
        waits = house.in_background(lambda: house.draw(seed=1))
        house.until_waiting(1)
        back = SharedEngine(models[last])
        enlist(house.service, "front", {**rest, "back": back})
        assert drawn(waits.result(60)) == picture, "the other one makes it, to the same bytes"
        house.until(lambda: last not in [each.device for each in house.service.fleet.members], "the old one forgotten")
    for engine in (*rest.values(), back):
        engine.door.leave()
        engine.thread.join(30)


def load_part(settings: ServerSettings, stages: str) -> DeviceModel:
    return load_model(engine_settings(settings, "cpu", "nowhere", parse_stages(stages)), lambda *_: None)
