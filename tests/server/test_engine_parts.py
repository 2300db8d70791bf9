"""Kept texts, messages, and what the front knows of an engine: each alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from rmd.presets import preset
from rmd.sampler import sample
from rmd.size import Size
from server.core import messages
from server.core.card import Schedule
from server.core.messages import (
    Began,
    Busy,
    Command,
    Ended,
    Lost,
    Message,
    Moved,
    Pixels,
    Ready,
    Stop,
    Submit,
    UsePolicy,
)
from server.core.stations import StationKey
from server.core.tickets import Request
from server.core.work import PictureRecord, Work
from server.device import door as door_module
from server.device.door import Door
from server.device.model import DeviceModel
from server.device.prompts import EncodedText, PromptCache
from server.device.steps import StageRunner
from server.front import member as member_module
from server.front.engine import Doorway, memory_policy, thread_policy
from server.front.member import Health, Member, WatchLimits
from tests.server.house import Clock, House

LOW = StationKey("denoise", size=Size(32, 32))
WORK = Work(id="a", prompt="ein Apfel \N{RED APPLE}", schedule="2+2", seeds=(1, 2**63 - 1), account="b", done=(0,))


def text(size: int) -> EncodedText:
    return EncodedText({"encoder_hidden_states": torch.zeros(size, dtype=torch.uint8)}, 1, 0)


def test_kept_texts_stay_within_their_memory() -> None:
    cache = PromptCache(100)
    cache.put("a", text(40))
    cache.put("a", text(40), negative=True)
    assert cache.get("a") and cache.get("a", negative=True)
    cache.get("a")
    cache.put("b", text(40))
    assert cache.get("a", negative=True) is None, "used longest ago"
    assert cache.get("a") and cache.get("b")
    cache.put("a", text(60))
    assert cache.get("b"), "replaced, not added"
    cache.put("huge", text(1000))
    assert cache.get("huge") and not cache.get("a") and not cache.get("b"), "one alone always stays"


def test_the_same_prompt_is_encoded_once(house: House) -> None:
    first, second = house.draw("again", seed=1), house.draw("again", seed=1)
    encoded = [component for component, _, _ in house.gate.calls if component == "text_encoder"]
    assert len(encoded) == 1 and first.json()["data"] == second.json()["data"]
    assert first.json()["usage"] == second.json()["usage"] and second.json()["rmd"]["seconds"]["encode"] == 0
    assert house.draw("again", seed=1, schedule="teacher", negative_prompt="again").status_code == 200
    house.draw("another")
    assert len([component for component, _, _ in house.gate.calls if component == "text_encoder"]) == 3


@pytest.mark.parametrize("command", [Submit(WORK), messages.Cancel("a"), UsePolicy("fifo"), messages.Stop()])
def test_commands_arrive_as_they_were_sent(command: Command) -> None:
    assert messages.unpack_command(messages.pack(command)) == command


def test_messages_arrive_as_they_were_sent(model: DeviceModel) -> None:
    record = PictureRecord(queue=1.0, stages={"32x32": 2.0}, batches={"32x32": [1, 2]})
    for message in (
        Ready((model.card,), ((LOW, 1, 0.1), (StationKey("encode"), 2, 0.2))),
        Began(1, LOW, (("a", 0),), ("b",), 0.1),
        Ended(1, LOW, 2, 2, 0.1, (Moved("a", 0, 1, LOW), Moved("a", 1, 4, None)), "retried"),
        Pixels("a", 0, (64, 64, 3), "64x64", -1, record),
        Lost("a", "failed", "RuntimeError: no"),
        Busy(3.0),
    ):
        again: Message = messages.unpack_message(messages.pack(message))
        assert again == message
    with pytest.raises(msgspec.DecodeError):
        messages.unpack_message(messages.pack(Submit(WORK)))
    with pytest.raises(msgspec.DecodeError):
        messages.unpack_command(b"\x93nonsense")


def test_a_published_students_schedule_passes_the_door_unchanged(model: DeviceModel) -> None:
    schedules = {
        name: Schedule(name, preset(name), "student") for name in ("sdxl-turbo-4", "lightx2v-wan-14b", "bottleneck")
    }
    ready = Ready((replace(model.card, schedules=schedules),), ())
    assert messages.unpack_message(messages.pack(ready)) == ready


def test_pixels_pass_the_door_unchanged_and_all_in_its_order() -> None:
    way = Doorway()
    door = Door(way.address)
    try:
        pixels = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), dtype=np.uint8)
        ended = Ended(1, LOW, 2, 2, 0.1, ())
        door.send(ended)
        for index in range(2):
            door.send(Pixels("a", index, pixels[index:, ::2].shape, "48x24x5"), pixels[index:, ::2])
        assert way.receive() is None, "a batch's results leave together"
        assert door.receive(0.001) is None, "at the latest when there is nothing else to do"
        assert way.receive(10) == (ended, None)
        for index in range(2):
            received = way.receive()
            assert received is not None and received[1] is not None and isinstance(received[0], Pixels)
            values = np.frombuffer(received[1], np.uint8).reshape(received[0].shape)
            assert received[0].index == index and (values == pixels[index:, ::2]).all()
        way.send(Submit(WORK))
        assert door.receive(10) == Submit(WORK) and door.receive(0.0) is None
    finally:
        door.close()
        way.close()


def test_the_front_is_not_woken_for_every_short_batch_and_never_late_for_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(door_module.time, "monotonic", clock)
    way = Doorway()
    door = Door(way.address)

    def heard() -> list[int]:
        found = []
        while (received := way.receive(0.05)) is not None:
            assert isinstance(received[0], Began | Ended | Pixels)
            found.append(received[0].batch if isinstance(received[0], Began | Ended) else -1)
        return found

    def short(number: int) -> Began:
        return Began(number, LOW, (), (), 0.02)

    try:
        door.send(short(1))
        assert heard() == [1], "where none ran before"
        door.send(Ended(1, LOW, 1, 1, 0.02, ()))
        door.send(short(2))
        assert heard() == [] and [batch.batch for batch in way.last_batches()] == [2], "it is written down at once"
        door.send(Ended(2, LOW, 1, 1, 0.02, ()))
        clock.now += 0.06
        door.send(short(3))
        assert heard() == [1, 2, 2, 3], "nothing is held back for long"
        door.send(Ended(3, LOW, 1, 1, 0.02, ()))
        door.send(Began(4, LOW, (), (), 0.2))
        assert heard() == [3, 4], "a long one may hang for long"
        door.send(Ended(4, LOW, 1, 1, 0.2, ()))
        door.send(Pixels("a", 0, (1, 1, 3), "1x1"), np.zeros((1, 1, 3), np.uint8))
        door.send(short(5))
        assert heard() == [4, -1, 5], "a picture leaves before the next batch"
    finally:
        door.close()
        way.close()


class Link:
    """An engine that is there."""

    pid = 0
    running = True

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.now = 1000.0
    monkeypatch.setattr(member_module.time, "monotonic", clock)
    return clock


@pytest.fixture
def member(clock: Clock, model: DeviceModel) -> Member:
    member = Member(0, "cpu", Link, WatchLimits(seconds=10.0, factor=20.0))  # type: ignore[arg-type]
    member.start()
    member.ready(Ready((model.card,), ((LOW, 1, 0.1),)))
    return member


def test_a_batch_may_take_a_multiple_of_its_time_and_no_more(member: Member, clock: Clock) -> None:
    for expected, patience in ((0.1, 10.0), (2.0, 40.0)):
        member.began(Began(1, LOW, (), (), expected))
        clock.now += patience - 0.5
        assert not member.hung() and not member.ping_due(), "it does not read while a batch runs"
        clock.now += 1.0
        assert "a batch at 32x32 took" in member.hung()
        member.ended(Ended(1, LOW, 1, 1, 0.1, ()))
        member.heard()


def test_an_engine_without_work_is_asked_for_a_sign_of_life(member: Member, clock: Clock) -> None:
    clock.now += 2.5
    assert member.ping_due() and not member.ping_due()
    clock.now += 9.0
    assert not member.hung()
    clock.now += 1.0
    assert "said nothing" in member.hung()
    member.heard()
    member.excuse(600.0)
    clock.now += 599.0
    assert not member.hung(), "it said that it would be busy"
    member.heard()
    clock.now += 13.0
    assert member.hung(), "and that it no longer is"


def test_an_engine_that_ends_is_started_again_ever_later_and_not_for_ever(member: Member, clock: Clock) -> None:
    pauses = []
    for _ in range(4):
        member.lost()
        assert member.health is Health.DOWN and member.link is None
        began = clock.now
        while not member.restart_due:
            clock.now += 0.5
        pauses.append(clock.now - began)
        member.start()
    assert pauses == [0.0, 1.0, 2.0, 4.0]
    member.lost()
    assert member.health is Health.DEAD and not member.restart_due


def test_ends_that_lie_far_apart_are_forgiven(member: Member, clock: Clock) -> None:
    for _ in range(20):
        member.lost()
        assert member.health is Health.DOWN
        clock.now += 200.0
        member.start()


def test_what_the_user_has_to_mend_is_not_tried_again(clock: Clock) -> None:
    member = Member(0, "cpu", Link, WatchLimits())  # type: ignore[arg-type]
    member.start()
    member.usage = True
    member.lost()
    assert member.health is Health.DEAD


def test_threads_wait_for_each_other_without_spinning_for_long_unless_told() -> None:
    assert set(thread_policy({})) == {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "TOKENIZERS_PARALLELISM"}
    assert set(thread_policy({"OMP_WAIT_POLICY": "active"})) == {"TOKENIZERS_PARALLELISM"}


_STEPS = """
import resource, torch
def step():
    for rows in (8, 4, 8, 1):
        buffers = [torch.ones(rows, 1 << 20) for _ in range(3)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other ways")
def test_memory_that_a_step_has_freed_is_not_mapped_again_for_the_next() -> None:
    def faults(policy: dict[str, str]) -> int:
        plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
        done = subprocess.run([sys.executable, "-c", _STEPS], env={**plain, **policy}, capture_output=True, check=True)
        return int(done.stdout)

    assert faults({}) > 10_000, "glibc's own way: a fault for each page of each buffer"
    assert faults(memory_policy({}, "cpu")) < 100
    assert memory_policy({}, "cuda") == {} == memory_policy({"MALLOC_ARENA_MAX": "2"}, "cpu")


def test_a_dead_engine_takes_no_command_and_holds_nobody_up() -> None:
    """A send to nobody waited for ever, with the fleet's lock held."""
    doorway = Doorway()
    try:
        started = time.monotonic()
        doorway.send(Stop())
        assert time.monotonic() - started < 5
    finally:
        doorway.close()


def test_guided_requests_are_encoded_though_nothing_can_be_kept(model: DeviceModel) -> None:
    runner = StageRunner(model, prompt_bytes=0)
    schedule = model.card.schedules["teacher"]
    for prompt in ("one", "two", "three"):
        work = Work(id=prompt, prompt=prompt, schedule="teacher", seeds=(0,))
        request = Request(work, schedule.cascade, schedule.lane, (0.0,))
        runner.run(StationKey("encode"), request.pictures)
        assert request.conditioning is not None and request.unconditional is not None


def test_a_batch_steps_as_the_sampler_does_whatever_its_members_noise(model: DeviceModel) -> None:
    """A published student's list of intensities, start, U and end, beside a request of the plain schedule."""
    plain = model.card.schedules["2+2"].cascade
    listed = replace(
        plain,
        steps=tuple(replace(step, timestep=step.timestep - 0.5) for step in plain.steps),
        step_noise_intensity=(0.3, 0.0, 0.6),
        transition_noise_intensity=0.2,
        x0_upsampling="bicubic",
        initial_noise_scale=0.9,
        final_timestep=100,
    )
    runner = StageRunner(model)
    works = [Work(id=str(i), prompt="a red fox", schedule="2+2", seeds=(i,)) for i in range(2)]
    requests = [Request(work, cascade, "student", (0.0,)) for work, cascade in zip(works, (plain, listed), strict=True)]
    pictures = [picture for request in requests for picture in request.pictures]
    runner.run(StationKey("encode"), pictures)
    for step in plain.steps:
        runner.run(StationKey("denoise", "student", step.size), pictures)
        for picture in pictures:
            picture.step += 1
    conditioning = model.backbone.encode_prompts(["a red fox"])
    for request, picture in zip(requests, pictures, strict=True):
        alone = sample(model.backbone, request.cascade, conditioning, [picture.seed])
        torch.testing.assert_close(picture.data, alone, rtol=0, atol=1e-4)
    ended = replace(listed, final_timestep=None)
    assert not torch.allclose(pictures[1].data, sample(model.backbone, ended, conditioning, [1]), atol=1e-2)
