"""Engines as the front meets them: hung, broken once, broken for good, stopped while a picture is decoded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from rmd.size import Size
from server.device.model import DeviceModel
from server.front import member as member_module
from tests.server.conftest import make_settings
from tests.server.house import House, serving


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between two starts."""
    monkeypatch.setattr(member_module, "_LONGEST_PAUSE_SECONDS", 0.0)


def test_a_step_that_hangs_costs_no_client_more_than_its_deadline(checkpoint: Path, model: DeviceModel) -> None:
    """And its place in the queue is given back, though the batch still holds the device."""
    with serving(model, make_settings(checkpoint, deadline_seconds=1)) as house:
        house.gate.close()
        sent = time.monotonic()
        reply = house.draw()
        assert reply.status_code == 504 and time.monotonic() - sent < 3.0
        assert house.service.admission.items == 0 and house.metric("rmd_queue_depth") == 0
        with house.client.stream("POST", "/v1/images/generations", json={"prompt": "a", "stream": True}) as stream:
            assert "deadline_exceeded" in "".join(stream.iter_text())
        house.gate.open()
        assert house.draw().status_code == 200


def test_a_device_that_breaks_once_costs_no_request(
    checkpoint: Path, model: DeviceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of four raises; alone, the second breaks the device: another engine makes what is left, and the rest."""
    encode, alone = model.backbone.encode_prompts, list[str]()

    def breaking(prompts: list[str]) -> dict[str, torch.Tensor]:
        if len(prompts) == 4:
            raise RuntimeError("not these four together")
        if "held" not in prompts and not house.metric("rmd_engine_restarts_total"):
            alone.extend(prompts)
            if len(alone) == 2:
                raise torch.AcceleratorError("the device is gone")
        return encode(prompts)

    with serving(model, make_settings(checkpoint)) as house:
        house.gate.close()
        held = house.in_background(lambda: house.draw("held"))
        assert house.gate.arrived.wait(30)
        monkeypatch.setattr(model.backbone, "encode_prompts", breaking)
        calls = [house.in_background(lambda i=i: house.draw(f"prompt {i}")) for i in range(4)]
        house.until_waiting(5)
        house.gate.open()
        assert [call.result().status_code for call in (held, *calls)] == [200] * 5
        assert len(alone) == 2 and house.metric("rmd_engine_restarts_total") == 1
        assert house.client.get("/health/ready").json()["engines"][0]["restarts"] == 1


def refuse(component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def refuse_to_decode(component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> None:
    if component == "decoder":
        refuse(component, size, inputs)


def spoil(component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> None:
    if component == "denoiser":
        inputs["latents"].fill_(torch.nan)


def spoil_the_full_size(component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> None:
    if str(size) == "64x64":
        spoil(component, size, inputs)


@pytest.mark.parametrize("sick", [refuse, refuse_to_decode, spoil, spoil_the_full_size])
def test_a_device_that_fails_for_everybody_is_started_again(
    house: House, sick: Callable[[str, Size | None, Mapping[str, torch.Tensor]], None]
) -> None:
    """It was 500 for ever, and the server stayed ready: of untyped errors, and of those after a good station."""
    house.gate.before = sick
    assert [house.draw(f"prompt {i}").status_code for i in range(3)] == [500] * 3
    house.until(lambda: house.metric("rmd_engine_restarts_total") == 1, "another engine")
    house.gate.before = lambda *_: None
    house.until(lambda: house.client.get("/health/ready").status_code == 200, "it to be ready")
    assert house.draw().status_code == 200


def test_requests_that_fail_beside_others_do_not_break_the_device(house: House) -> None:
    """The known-good probe passes."""

    def poisoned(component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> None:
        if component == "denoiser" and bool((inputs["encoder_hidden_states"].abs() > 1e5).any()):
            raise RuntimeError("these conditions cannot be computed with")

    encode = house.model.backbone.encode_prompts
    house.model.backbone.encode_prompts = lambda prompts: {
        name: value * (1e7 if "poison" in prompts[0] and name == "encoder_hidden_states" else 1)
        for name, value in encode(prompts).items()
    }
    house.gate.before = poisoned
    try:
        assert [house.draw(f"poison {i}").status_code for i in range(7)] == [500] * 7
    finally:
        del house.model.backbone.encode_prompts
    assert house.draw().status_code == 200 and house.metric("rmd_engine_restarts_total") == 0


def test_an_empty_prompt_that_encodes_to_nan_is_not_kept(
    checkpoint: Path, model: DeviceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands for 'no condition' in every guided request, and was kept for all that came after."""
    sound = model.backbone.encode_unconditional
    with serving(model, make_settings(checkpoint)) as house:
        with monkeypatch.context() as patch:
            patch.setattr(
                model.backbone,
                "encode_unconditional",
                lambda rows: {name: value * torch.nan for name, value in sound(rows).items()},
            )
            assert house.draw(schedule="teacher").status_code == 500
        assert house.draw(schedule="teacher").status_code == 200


def test_a_device_that_is_never_well_again_is_given_up(house: House) -> None:
    house.gate.before = refuse
    house.until(lambda: house.draw().status_code == 503, "no engine to be left")
    assert house.client.get("/health/live").status_code == 503
    ready = house.client.get("/health/ready")
    assert ready.status_code == 503 and ready.json()["engines"][0]["status"] == "dead"
    assert "illegal memory access" in ready.json()["reason"]
    assert house.service.admission.items == 0


def test_a_picture_that_is_decoded_when_the_stop_comes_still_arrives(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.front.service.LAST_BATCH_SECONDS", 30.0)  # however busy the machine is
    decoding, go = threading.Event(), threading.Event()

    def hold(component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> None:
        if component == "decoder":
            decoding.set()
            assert go.wait(30)

    house.gate.before = hold
    call = house.in_background(house.draw)
    assert decoding.wait(30)
    stopping = house.in_background(house.service.stop)
    house.until(lambda: house.draw("too late").status_code == 503, "the stop to begin")
    go.set()
    assert call.result().status_code == 200
    stopping.result()
