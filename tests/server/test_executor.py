"""The device thread alone, without HTTP: what its end leaves behind."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping

import pytest
import torch

from rmd.size import Size
from server.core.admission import Admission
from server.core.request import Event, Failed, FinishedPicture, Generation, GenerationSpec
from server.device.executor import DeviceExecutor
from server.device.model import ServedModel
from server.telemetry.metrics import Metrics, Snapshot
from tests.server.house import Gate


def lone_executor(model: ServedModel) -> DeviceExecutor:
    return DeviceExecutor(lambda: model, Metrics(lambda: Snapshot(True, False, 1.0, 0, 0, 0)))


def admitted(model: ServedModel, admission: Admission, prompt: str) -> tuple[Generation, list[Event]]:
    """One picture's generation and the events that its client is told."""
    events: list[Event] = []
    schedule = model.schedules["2+2"]
    spec = GenerationSpec(prompt, schedule.name, schedule.cascade, schedule.lane, seeds=(0,))
    costs = model.costs(schedule.cascade, schedule.lane)
    return Generation(spec, admission.acquire(1, 1), math.inf, events.append, costs), events


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def codes(events: list[Event]) -> list[str]:
    return [event.error.code for event in events if isinstance(event, Failed)]


def run_until_broken(model: ServedModel, count: int) -> tuple[DeviceExecutor, Admission, list[list[str]]]:
    """Give ``count`` requests at once to a device that breaks; how each ended."""
    admission, executor = Admission(8, 10**9), lone_executor(model)
    generations = [admitted(model, admission, f"prompt {i}") for i in range(count)]
    for generation, _ in generations:
        executor.submit(generation)
    executor.start()
    until(lambda: not executor.alive)
    assert admission.items == 0, "every permit came back"
    return executor, admission, [codes(events) for _, events in generations]


def test_a_device_that_breaks_within_a_retried_batch_leaves_nobody_waiting(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of four raises; alone, the first is fine, the second breaks the device, the others never get to run."""
    encode, alone = model.backbone.encode_prompts, list[str]()

    def breaking(prompts: list[str]) -> dict[str, torch.Tensor]:
        if len(prompts) == 4:
            raise RuntimeError("not these four together")
        alone.extend(prompts)
        if len(alone) == 2:
            raise torch.AcceleratorError("the device is gone")
        return encode(prompts)

    monkeypatch.setattr(model.backbone, "encode_prompts", breaking)
    executor, admission, found = run_until_broken(model, 4)
    assert len(alone) == 2
    assert sorted(found) == [["engine_failed"], *[["not_ready"]] * 3]

    late, events = admitted(model, admission, "too late")
    executor.submit(late)
    assert codes(events) == ["not_ready"] and admission.items == 0
    executor.stop()


def test_a_device_that_breaks_under_several_blames_none_of_them(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(prompts: list[str]) -> dict[str, torch.Tensor]:
        raise torch.AcceleratorError("the device is gone")

    monkeypatch.setattr(model.backbone, "encode_prompts", breaking)
    executor, _, found = run_until_broken(model, 3)
    assert found == [["not_ready"]] * 3, "each may be asked for elsewhere"
    executor.stop()


def test_a_picture_that_outlasts_the_stop_still_arrives(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, go = threading.Event(), threading.Event()

    def hold(component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> None:
        if component == "decoder":
            decoding.set()
            assert go.wait(30)

    gate = Gate(model.backbone.executor)
    gate.before = hold
    monkeypatch.setattr(model.backbone, "executor", gate)
    admission, executor = Admission(8, 10**9), lone_executor(model)
    generation, events = admitted(model, admission, "a red rocket")
    executor.submit(generation)
    executor.start()
    assert decoding.wait(30)
    executor.stop(timeout=0.01)
    assert executor.alive, "the batch still runs"
    go.set()
    until(lambda: events)
    assert isinstance(events[0], FinishedPicture) and admission.items == 0
    executor.stop()
    assert not executor.alive
