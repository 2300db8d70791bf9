"""Stages on engines of their own: the same bytes as on one, whichever engine dies, and settings that cannot be."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.core.messages import Lost, Submit
from server.core.stages import ALL, name_of, parse_stages
from server.core.work import PictureRecord, PictureState, Work
from server.device.loading import load_model
from server.device.model import DeviceModel, Loaded
from server.front import member as member_module
from server.front.engine import engine_settings
from server.front.service import Service
from server.start.films import open_jobs
from server.start.settings import ServerSettings
from tests.server.conftest import load_on_cpu, make_settings
from tests.server.house import Gate, House, running, serving
from tests.server.shared_engine import SharedEngine, front
from tests.server.standstill import standing_still
from tests.server.test_processes import draw_all, engines, pictures, pid, until_all_ready
from tests.server.test_videos import content, ended, post, read
from tests.server.thread_engine import ThreadEngine

LAYOUTS = ("low,high+decode", "low+high,decode", "low,high,decode", "low+decode,high", "all,decode")
QUICK = {"measure_teacher": False, "threads": 1, "max_batch": 1, "build_missing": False}


@cache
def loaded(checkpoint: Path, stages: str) -> DeviceModel:
    settings = make_settings(checkpoint, **QUICK)
    return load_model(engine_settings(settings, "cpu", "nowhere", parse_stages(stages)), lambda *_: None)


@contextlib.contextmanager
def apart(settings: ServerSettings, layout: str) -> Iterator[House]:
    """A server whose engines, in threads, have these stages."""
    models = [loaded(settings.checkpoint[0], stages) for stages in layout.split(",")]
    starts = [("cpu", lambda model=model: ThreadEngine(model)) for model in models]
    with running(Service(settings, open_jobs, starts)) as house:
        yield house


def drawn(house: House, **fields: Any) -> list[str]:
    reply = house.draw(**fields)
    assert reply.status_code == 200, reply.text
    return [each["b64_json"] for each in reply.json()["data"]]


def streamed(house: House, **fields: Any) -> list[tuple[str, Any, str]]:
    """Every event's kind, number and picture; pictures of one request come in any order."""
    text = house.draw(stream=True, **fields).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    return sorted((each["type"], each.get("partial_image_index"), each["b64_json"]) for each in events)


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> dict[str, Any]:
    """What one engine makes."""
    settings = make_settings(checkpoint, **QUICK)
    with serving(load_on_cpu(settings), settings) as house:
        return {
            "two": drawn(house, seed=3, n=2),
            "teacher": drawn(house, seed=4, schedule="teacher"),
            "watched": streamed(house, seed=5, n=2, partial_images=2),
            "models": timeless(house),
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_apart_give_the_bytes_of_one_engine(checkpoint: Path, whole: dict[str, Any], layout: str) -> None:
    with apart(make_settings(checkpoint, **QUICK), layout) as house:
        until_all_ready(house)
        assert drawn(house, seed=3, n=2) == whole["two"]
        assert drawn(house, seed=4, schedule="teacher") == whole["teacher"]
        tries = 0

        def watched() -> bool:
            nonlocal tries
            tries, seen = tries + 1, streamed(house, seed=5, n=2, partial_images=2)
            assert set(seen) <= set(whole["watched"]), "a partial picture may come too late and be left out, no more"
            return seen == whole["watched"]

        house.until(watched, "partial pictures too")
        house.until_idle()
        assert house.metric("rmd_steps_total") == 2 * 4 + 6 + tries * 2 * 4, "no step twice"
        assert house.metric("rmd_queue_depth") == 0 and house.metric("rmd_pictures_total") == 3 + 2 * tries
        assert set(house.service.fleet.work().values()) == {0.0}

        def busy() -> dict[str, float]:
            engines = [str(each.index) for each in house.service.fleet.members]
            return {engine: house.metric("rmd_device_busy_seconds_total", engine=engine) for engine in engines}

        # A partial picture that came too late may still be decoded.
        counted = lambda: sum(busy().values()) == pytest.approx(house.metric("rmd_step_seconds_sum"))  # noqa: E731
        house.until(counted, "no batch to be counted twice")
        assert all(busy().values()), "each has done something"
        assert timeless(house) == whole["models"]
        loops = [member.link.engine._loop for member in house.service.fleet.members]
        house.until(lambda: not any(loop._requests for loop in loops), "engines to forget what is done")


def timeless(house: House) -> dict[str, Any]:
    """The models as clients are told of them, but for what was timed."""
    models: dict[str, Any] = house.client.get("/v1/models").json()
    for entry in models["data"]:
        for schedule in entry["rmd"]["schedules"].values():
            assert schedule.pop("expected_seconds") > 0
    return models


def test_an_engine_holds_the_weights_of_its_stages_alone(checkpoint: Path) -> None:
    held = {stages: set(loaded(checkpoint, stages).card.memory_bytes) for stages in ("all", "low", "decode")}
    lanes = {name.split()[0] for name in held["all"]}
    assert "decoder" in lanes and "denoiser" in lanes
    assert held["decode"] == {"decoder", "teacher decoder"}
    assert held["low"] == {name for name in held["all"] if "decoder" not in name}


def test_a_film_of_stages_apart_has_the_bytes_of_one_engine(film_checkpoint: Path) -> None:
    films = []
    settings = make_settings(film_checkpoint, **QUICK)
    for layout in ("all", "low,high,decode"):
        with apart(settings, layout) as house:
            until_all_ready(house)
            job = post(house, seed=5)
            assert ended(house, job)["status"] == "completed"
            assert read(house, job)["progress"] == 100
            films.append(content(house, job))
    assert films[0] == films[1]


def test_a_model_that_one_stage_could_not_load_is_not_offered(checkpoint: Path, film_checkpoint: Path) -> None:
    """Its films would be denoised, and wait for ever to be decoded."""
    settings, why = make_settings((checkpoint, film_checkpoint), **QUICK), "OSError: no space"
    film, missing = film_checkpoint.name, {checkpoint.name: why, film_checkpoint.name: why}

    def holding(stages: str, *indices: int) -> tuple[str, Any]:
        told = engine_settings(settings, "cpu", "nowhere", parse_stages(stages))
        models = [load_model(told, lambda *_: None, index) for index in indices]
        held = Loaded(
            models, {name: why for name, why in missing.items() if name not in {m.card.model_id for m in models}}
        )
        return "cpu", lambda: ThreadEngine(load=lambda report: held)

    with running(Service(settings, open_jobs, [holding("low+high", 0, 1), holding("decode", 0)])) as house:
        until_all_ready(house)
        assert [each["id"] for each in house.client.get("/v1/models").json()["data"]] == [checkpoint.name]
        assert house.client.get("/health/ready").json()["not_loaded"] == {film: why}
        refused = house.client.post("/v1/videos", data={"prompt": "a"})
        assert refused.status_code == 404 and refused.json()["error"]["code"] == "model_makes_pictures"
        assert drawn(house, seed=3)
    nothing = Service(settings, open_jobs, [holding("low+high", 0), holding("decode", 1)])
    unserved = pytest.raises(AssertionError, match="no checkpoint could be loaded by an engine of every stage: tiny")
    with unserved, running(nothing):
        pass


def test_what_is_cancelled_behind_its_hand_over_is_not_decoded(checkpoint: Path) -> None:
    backbone = loaded(checkpoint, "decode").backbone
    inner, size = backbone.executor, loaded(checkpoint, "decode").card.sizes[-1]
    backbone.executor = gate = Gate(inner)
    try:
        with apart(make_settings(checkpoint, watchdog_seconds=90, **QUICK), "low+high,decode") as house:
            until_all_ready(house)
            gate.close()
            first = house.in_background(lambda: drawn(house, seed=1))
            assert gate.arrived.wait(60), "its decoding has begun, and waits"
            connection = house.send(prompt="a", n=2)
            house.until(lambda: house.metric("rmd_queue_depth", station=f"decode {size}") == 2, "both handed over")
            connection.close()
            house.until_waiting(1)
            second = house.in_background(lambda: drawn(house, seed=2))
            house.until(lambda: house.metric("rmd_queue_depth", station=f"decode {size}") == 1, "the next hand-over")
            gate.open()
            assert first.result(60) and second.result(60)
            assert gate.calls == [("decoder", size, 1)] * 2, "theirs alone"
    finally:
        gate.open()
        backbone.executor = inner


def test_stages_apart_behind_open_doors(checkpoint: Path, whole: dict[str, Any]) -> None:
    """As on a cluster. Engines that leave wait for nothing that others have by now."""
    shared = {stages: SharedEngine(loaded(checkpoint, stages)) for stages in ("low", "high", "decode")}
    with front(make_settings(checkpoint, **QUICK), "front", **shared) as house:
        until_all_ready(house)
        assert drawn(house, seed=3, n=2) == whole["two"]
        assert streamed(house, seed=5, n=2, partial_images=2) == whole["watched"]
        for engine in shared.values():
            engine.door.leave()
            engine.thread.join(30)
            assert not engine.thread.is_alive(), "it ends when it is told to leave"


# -- engines that die --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(checkpoint: Path) -> Iterator[House]:
    """Low, high and decode in processes of their own, which may end often, and are started again at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member_module, "_FAILURES", 100)
        patch.setattr(member_module, "_LONGEST_PAUSE_SECONDS", 0.0)
        told = {"devices": "cpu,cpu,cpu", "stages": "low,high,decode", "watchdog_seconds": 60, "deadline_seconds": 90}
        with engines(checkpoint, max_batch=1, **told) as house:
            yield house


LOW, HIGH, DECODE = range(3)


@contextlib.contextmanager
def stopped(house: House, *indices: int) -> Iterator[None]:
    """Engines that stand still until the block ends, or are killed in it."""
    until_all_ready(house)
    with standing_still([pid(house, index) for index in indices]):
        yield


def steps(house: House, size: str = "") -> float:
    return house.metric("rmd_steps_total", **({"station": size} if size else {}))


def sizes(house: House) -> Sequence[str]:
    (card,) = house.service.cards
    return [str(stage.size) for stage in card.schedules[card.default].cascade.stages]


def test_a_decoder_killed_between_hand_over_and_decoding_costs_no_step(three: House) -> None:
    until_all_ready(three)
    undisturbed, before = drawn(three, seed=3, n=2), steps(three)
    decoding = f"decode {sizes(three)[-1]}"
    with stopped(three, DECODE):
        call = three.in_background(lambda: drawn(three, seed=3, n=2))
        three.until(lambda: three.metric("rmd_queue_depth", station=decoding) == 2, "both handed over")
        assert steps(three) == before + 8
        restarts = three.metric("rmd_engine_restarts_total", engine=str(DECODE))
        os.kill(pid(three, DECODE), signal.SIGKILL)
        three.until(lambda: three.client.get("/health/ready").status_code == 503, "the probe to say so")
        assert three.client.get("/health/ready").json()["reason"].startswith("no engine works at decode")
        assert call.result(90) == undisturbed, "the same to the bit"
    assert steps(three) == before + 8, "no step was run again"
    assert three.metric("rmd_engine_restarts_total", engine=str(DECODE)) == restarts + 1


def test_a_low_engine_that_dies_takes_nothing_along_that_it_has_handed_over(three: House) -> None:
    until_all_ready(three)
    undisturbed, (low, high) = drawn(three, seed=4), sizes(three)
    before = steps(three, low)
    with stopped(three, HIGH):
        call = three.in_background(lambda: drawn(three, seed=4))
        three.until(lambda: three.metric("rmd_queue_depth", station=high) == 1, "the hand-over")
        os.kill(pid(three, LOW), signal.SIGKILL)
        three.until(lambda: three.metric("rmd_engine_up", engine=str(LOW)) == 0, "the metric to say so")
    assert call.result(90) == undisturbed
    assert steps(three, low) == before + 2, "no low step was run again"


def test_an_engine_killed_in_a_crowd_costs_no_picture(three: House) -> None:
    until_all_ready(three)
    undisturbed, made = pictures(draw_all(three, 12)), three.metric("rmd_pictures_total")
    calls = three.in_background(lambda: draw_all(three, 12))
    three.until(lambda: three.metric("rmd_pictures_total") > made + 1, "some of them done")
    os.kill(pid(three, HIGH), signal.SIGKILL)
    assert pictures(calls.result(90)) == undisturbed, "the same to the bit"
    three.until_idle()


def test_a_stage_without_engines_for_good_ends_the_server(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_module, "_FAILURES", 1)
    with apart(make_settings(checkpoint, **QUICK), "low+high,decode") as house:
        until_all_ready(house)
        house.service.fleet.members[1].link.engine._stopping = True
        house.until(lambda: house.client.get("/health/live").status_code == 503, "the end")
        body = house.client.get("/health/ready").json()
        assert [each["status"] for each in body["engines"]] == ["ready", "dead"]
        assert [each["stages"] for each in body["engines"]] == ["low+high", "decode"]
        assert house.draw().status_code == 503


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"shape": (1, 4, 9, 9), "latents": bytes(16)}, "latents of 16 bytes were handed over"),
        ({"shape": (), "latents": b""}, "latents of 0 bytes were handed over"),
        ({"shape": (-1, 4), "latents": bytes(16)}, "latents of 16 bytes were handed over"),
        ({"shape": (1,), "latents": bytes(4), "index": 7}, "index out of range"),
        ({"shape": (1, 1, 3, 3), "latents": bytes(36)}, "latents of shape (1, 1, 3, 3) are not"),
        ({"shape": (1,), "latents": bytes(4), "fingerprint": "of others"}, "with other files of the model 'tiny' than"),
    ],
)
def test_a_hand_over_that_cannot_be_costs_its_request_and_not_the_engine(
    checkpoint: Path, state: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with apart(make_settings(checkpoint, **QUICK), "low+high,decode") as house:
        until_all_ready(house)
        fleet = house.service.fleet
        known = {"fingerprint": fleet.cards[""].fingerprint, "index": 0, "step": 4, "record": PictureRecord()}
        heard = list[Lost]()
        monkeypatch.setattr(fleet._ledger, "lost", heard.append)
        work = Work(id="odd", prompt="a", schedule="2+2", seeds=(1,), done=(0,))
        odd = PictureState(**{**known, **state})
        fleet._outbox.append((fleet.members[DECODE - 1], Submit(work, (odd,))))
        fleet._wake()
        house.until(lambda: [each.id for each in heard] == ["odd"], "the word that it has failed")
        assert reason in heard[0].reason
        assert drawn(house, seed=3)
        assert fleet.members[DECODE - 1].restarts == 0


def test_an_engine_that_says_what_means_nothing_is_started_again(checkpoint: Path) -> None:
    """As one of another version: it costs nobody but itself."""
    with apart(make_settings(checkpoint, **QUICK), "low+high,decode") as house:
        until_all_ready(house)
        undisturbed, member = drawn(house, seed=3), house.service.fleet.members[1]
        member.link.engine._door._frames.append(b"\x93no message")
        house.until(lambda: member.restarts == 1 and house.service.ready, "another one")
        assert house.service.alive and drawn(house, seed=3) == undisturbed


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "stages", "reason"),
    [
        ("cpu,cpu", "low,decode", "stages: no engine has high"),
        ("cpu,cpu", "high,high", r"stages: no engine has low\+decode"),
        ("cpu,cpu", "all", "stages has 1 entries, and there are 2 engines"),
        ("", "low,high+decode", "stages has 2 entries, and there are 1 engines"),
        ("cpu,cpu", "low,high+decod", "stages: 'decod' is no stage; they are all, low, high, decode"),
        ("cpu,cpu", "low,high++decode", "stages: '' is no stage"),
    ],
)
def test_stages_that_cannot_be_are_refused(devices: str, stages: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ServerSettings(devices=devices, stages=stages)


def test_stages_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMD_DEVICES", "cuda:0,cuda:1")
    assert ServerSettings().engine_stages == (ALL, ALL)
    monkeypatch.setenv("RMD_STAGES", "low, high + decode")
    assert [name_of(each) for each in ServerSettings().engine_stages] == ["low", "high+decode"]
