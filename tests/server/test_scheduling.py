"""Batches shared between requests; and what others see when one fails, leaves, is late or is one too many."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from openai import OpenAI

from rmd.size import Size
from server.device.model import DeviceModel
from server.http import streaming
from tests.server.conftest import make_settings
from tests.server.house import House, pixels, serving


@contextlib.contextmanager
def held(house: House) -> Iterator[None]:
    """Keep the device busy with one request while the block runs, so that what it sends has to queue."""
    house.gate.close()
    first = house.in_background(lambda: house.draw("first", seed=0))
    assert house.gate.arrived.wait(30)
    try:
        yield
    finally:
        house.gate.open()
        assert first.result().status_code == 200


def picture(reply: httpx.Response) -> np.ndarray:
    assert reply.status_code == 200, reply.text
    return pixels(reply.json()["data"][0]["b64_json"])


def test_concurrent_requests_share_batches_whatever_their_schedule(house: House) -> None:
    alone = {seed: picture(house.draw(f"prompt {seed}", seed=seed)) for seed in range(4)}
    alone_other = picture(house.draw("other", seed=9, schedule="0+4"))
    with held(house):
        calls = [house.in_background(lambda seed=seed: house.draw(f"prompt {seed}", seed=seed)) for seed in range(4)]
        other = house.in_background(lambda: house.draw("other", seed=9, schedule="0+4"))
        house.until_waiting(6)
    replies = [call.result() for call in calls]
    low = [reply.json()["rmd"]["stages"][0] for reply in replies]
    assert all(stage["size"] == "32x32" for stage in low)
    widest = max(max(stage["batch_sizes"]) for stage in low)
    assert widest == 5, "the low size gains from batches, so all of them ride, and the one that was first"
    high = [reply.json()["rmd"]["stages"][1]["batch_sizes"] for reply in replies]
    assert all(size == 1 for sizes in high for size in sizes), "the full size gains nothing, so it stays narrow"
    for seed, reply in enumerate(replies):
        assert abs(alone[seed] - picture(reply)).max() <= 1, "company does not change a picture"
    assert abs(alone_other - picture(other.result())).max() <= 1
    assert house.metric("rmd_batch_size_sum", station="32x32") > house.metric("rmd_batch_size_count", station="32x32")
    assert max(batch for component, size, batch in house.gate.calls if component == "denoiser") >= 4


def test_fresh_noise_at_the_change_of_size_is_each_requests_own(house: House) -> None:
    options = [{"seed": 1, "noise_intensity": 0.0}, {"seed": 2, "noise_intensity": 0.5}, {"seed": 3}]
    alone = [picture(house.draw("a", **entry)) for entry in options]
    with held(house):
        calls = [house.in_background(lambda entry=entry: house.draw("a", **entry)) for entry in options]
        house.until_waiting(4)
    together = [call.result() for call in calls]
    assert max(together[0].json()["rmd"]["stages"][0]["batch_sizes"]) == 4, "with the one that was first"
    for before, after in zip(alone, together, strict=True):
        assert abs(before - picture(after)).max() <= 1


def test_a_schedule_that_the_weights_were_not_distilled_for_says_so(checkpoint: Path, model: DeviceModel) -> None:
    from dataclasses import replace

    from server.core.card import Schedule

    plain = model.card.schedules["2+2"].cascade
    naive = replace(plain, note="not distilled for this schedule", step_noise_intensity=(0.5, 0.0, 0.25))
    card = replace(model.card, schedules={"2+2": Schedule("2+2", naive, "student"), "0+4": model.card.schedules["0+4"]})
    with serving(replace(model, card=card), make_settings(checkpoint)) as house:
        schedules = house.client.get("/v1/models/tiny").json()["rmd"]["schedules"]
        assert schedules["2+2"]["note"] == "not distilled for this schedule" and "note" not in schedules["0+4"]
        reply = house.draw("a", seed=1)
        assert reply.json()["rmd"]["note"] == "not distilled for this schedule"
        assert house.draw("a", seed=1, schedule="0+4").json()["rmd"]["note"] == ""
        drawn = picture(reply)
    with serving(model, make_settings(checkpoint)) as house:
        assert abs(drawn - picture(house.draw("a", seed=1))).max() > 8, "its list of noise intensities is obeyed"


def test_guided_and_unguided_items_share_one_call(checkpoint: Path, model: DeviceModel) -> None:
    """A guided item takes two rows of the same batch as a student's one row, where both use the same weights."""
    from dataclasses import replace

    from server.core.card import Schedule

    guided = replace(model.card.schedules["2+2"].cascade, guidance_scale=3.0)
    schedules = {**model.card.schedules, "guided": Schedule("guided", guided, "student")}
    card = replace(model.card, schedules=schedules)
    with serving(replace(model, card=card), make_settings(checkpoint)) as house:
        alone = [picture(house.draw("a", seed=1)), picture(house.draw("b", seed=2, schedule="guided"))]
        house.gate.calls.clear()
        with held(house):
            plain = house.in_background(lambda: house.draw("a", seed=1))
            double = house.in_background(lambda: house.draw("b", seed=2, schedule="guided"))
            house.until_waiting(3)
        together = [picture(plain.result()), picture(double.result())]
        low = min(model.card.schedules["2+2"].cascade.sizes)
        assert ("denoiser", low, 4) in house.gate.calls, "one row, two rows, and that of the one that was first"
    for before, after in zip(alone, together, strict=True):
        assert abs(before - after).max() <= 1


def test_a_long_teacher_request_does_not_hold_up_the_students(house: House) -> None:
    finished: list[str] = []

    def draw(name: str, **fields: object) -> None:
        assert house.draw(name, **fields).status_code == 200
        finished.append(name)

    with held(house):
        teacher = house.in_background(lambda: draw("teacher", schedule="teacher", n=2))
        house.until_waiting(3)
        students = [house.in_background(lambda i=i: draw(f"student {i}")) for i in range(4)]
        house.until_waiting(7)
    for call in (teacher, *students):
        call.result()
    assert finished[-1] == "teacher"


def test_a_poisoned_request_fails_alone(house: House) -> None:
    """One prompt's conditions make the network raise; its batch mates get their pictures."""
    clean = picture(house.draw("fine 0", seed=0))
    encode = house.model.backbone.encode_prompts

    def poisoned(prompts: list[str]) -> dict[str, torch.Tensor]:
        conditioning = encode(prompts)
        for row, prompt in enumerate(prompts):
            if prompt == "poison":
                conditioning["encoder_hidden_states"][row] = 1e6
            if prompt == "nan":
                conditioning["encoder_hidden_states"][row] = float("nan")
        return conditioning

    def refuse(component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> None:
        if component == "denoiser" and bool((inputs["encoder_hidden_states"] >= 1e6).any()):
            raise RuntimeError("these conditions cannot be computed with")

    house.gate.before = refuse
    house.model.backbone.encode_prompts = poisoned  # type: ignore[method-assign, assignment]
    try:
        with held(house):
            good = [house.in_background(lambda i=i: house.draw(f"fine {i}", seed=i)) for i in range(3)]
            bad = [house.in_background(lambda name=name: house.draw(name)) for name in ("poison", "nan")]
            house.until_waiting(6)
        failures = [call.result() for call in bad]
        replies = [call.result() for call in good]
    finally:
        del house.model.backbone.encode_prompts
    assert [failure.status_code for failure in failures] == [500, 500]
    for failure in failures:
        assert failure.json()["error"]["code"] == "engine_failed" and failure.headers["x-should-retry"] == "false"
        assert "conditions" not in failure.text, "the reason is for the log"
    assert abs(picture(replies[0]) - clean).max() <= 1
    assert all(reply.status_code == 200 for reply in replies)
    assert house.metric("rmd_requests_total", outcome="engine_failed") == 2
    assert house.metric("rmd_retried_batches_total") >= 1
    house.until_idle()
    assert house.draw().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_places(house: House, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rmd.access")
    with held(house):
        connection = house.send(prompt="gone", n=3, stream=stream)
        house.until_waiting(4)
        connection.close()
        house.until_waiting(1)
        assert house.metric("rmd_queue_depth") == 0
    house.until_idle()
    house.until(lambda: house.metric("rmd_requests_total", outcome="client_gone") == 1, "the count")
    assert len(re.findall(r" client_gone [\d.]+s [0-9a-f]{32}", caplog.text)) == 1
    assert house.metric("rmd_dropped_items_total", outcome="client_gone") == 3
    assert house.metric("rmd_pictures_total") == 1


def test_a_stream_is_never_silent_for_long_while_its_picture_waits(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxies and clients give up what says nothing: nginx after a minute."""
    monkeypatch.setattr(streaming, "_HEARTBEAT_SECONDS", 0.05)
    with httpx.Client(base_url=house.url, timeout=60) as client, contextlib.ExitStack() as device:
        device.enter_context(held(house))
        body = {"prompt": "a", "seed": 1, "stream": True}
        with client.stream("POST", "/v1/images/generations", json=body) as reply:
            lines = reply.iter_lines()
            assert [next(lines) for _ in range(4)] == [": still drawing", ""] * 2, "nothing is drawn meanwhile"
            device.close()
            assert "event: image_generation.completed" in list(lines)


def test_a_client_that_leaves_while_its_step_runs_is_dropped_at_the_next(house: House) -> None:
    house.gate.close()
    connection = house.send(prompt="gone", schedule="teacher")
    assert house.gate.arrived.wait(30)
    connection.close()
    house.until(lambda: house.metric("rmd_requests_total", outcome="client_gone") == 1, "the 499")
    house.gate.open()
    house.until_idle()
    assert "denoiser" not in {component for component, _, _ in house.gate.calls}
    assert house.metric("rmd_steps_total") == 0


def test_a_failure_that_passes_fails_nobody(house: House) -> None:
    failed: list[str] = []

    def stumble(component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> None:
        if component == "denoiser" and not failed:
            failed.append(component)
            raise RuntimeError("once")

    house.gate.before = stumble
    assert house.draw().status_code == 200
    assert failed and house.metric("rmd_retried_batches_total") == 1


def test_a_request_that_fails_is_tried_no_further_and_named_in_the_log(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> None:
        if component == "denoiser":
            raise RuntimeError("no")

    house.gate.before = refuse
    reply = house.draw(n=4)
    assert reply.status_code == 500
    house.until_idle()
    tries = [batch for component, _, batch in house.gate.calls if component == "denoiser"]
    assert tries == [4, 1], "its other pictures are not drawn for nobody"
    assert caplog.text.count(f"request {reply.headers['x-request-id']} failed") == 1


def test_a_batch_that_ran_out_of_memory_is_not_tried_as_wide_again(house: House) -> None:
    def limited(component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> None:
        if component == "denoiser" and len(next(iter(inputs.values()))) > 2:
            raise torch.OutOfMemoryError("too wide")

    house.gate.before = limited
    for _ in range(3):
        assert len(house.draw(n=4).json()["data"]) == 4
    wide = [size for component, size, batch in house.gate.calls if component == "denoiser" and batch > 2]
    assert wide and len(wide) == len(set(wide)), "once at each size"


def test_a_failure_within_a_stream_reaches_the_official_client(house: House) -> None:
    def refuse(component: str, size: Size | None, inputs: Mapping[str, torch.Tensor]) -> None:
        if component == "decoder" and size == max(house.model.card.sizes):
            raise RuntimeError("no")

    house.gate.before = refuse
    client = OpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError) as error:
        list(client.images.generate(prompt="a", stream=True, partial_images=1))
    assert error.value.code == "engine_failed"
    # A request is counted when its reply is over, which its client knows a moment before.
    house.until(lambda: house.metric("rmd_requests_total", outcome="engine_failed") == 1, "its count")


def test_a_full_queue_answers_429_with_the_time_to_come_back(checkpoint: Path, model: DeviceModel) -> None:
    with serving(model, make_settings(checkpoint, max_images=3, queue_items=3)) as house:
        with held(house):
            waiting = house.in_background(lambda: house.draw(n=2))
            house.until_waiting(3)
            refused = house.draw()
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 120
            assert "x-should-retry" not in refused.headers
            with pytest.raises(openai.RateLimitError):
                OpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0).images.generate(prompt="a")
        assert waiting.result().status_code == 200
        house.until_idle()
        assert house.draw().status_code == 200
        assert house.metric("rmd_requests_total", outcome="queue_full") == 2


def test_pixels_are_bounded_too(checkpoint: Path, model: DeviceModel) -> None:
    two_pictures = 2 * 64 * 64 / 1e6
    with serving(model, make_settings(checkpoint, queue_megapixels=two_pictures)) as house, held(house):
        waiting = house.in_background(lambda: house.draw())
        house.until_waiting(2)
        assert house.draw().status_code == 429
        house.gate.open()
        assert waiting.result().status_code == 200


def test_a_deadline_is_checked_between_steps(checkpoint: Path, model: DeviceModel) -> None:
    with serving(model, make_settings(checkpoint, deadline_seconds=0.4)) as house:
        house.gate.close()
        late = house.in_background(lambda: house.draw(schedule="teacher"))
        assert house.gate.arrived.wait(30)
        time.sleep(0.5)
        house.gate.open()
        reply = late.result()
        assert reply.status_code == 504 and reply.headers["x-should-retry"] == "false"
        house.until_idle()
        assert house.metric("rmd_steps_total") == 0, "it was dropped at the first hand-over"
        assert house.metric("rmd_requests_total", outcome="deadline") == 1


def test_a_drain_finishes_what_was_accepted(checkpoint: Path, model: DeviceModel) -> None:
    with serving(model, make_settings(checkpoint)) as house:
        house.gate.close()
        accepted = house.in_background(lambda: house.draw(n=2))
        house.until_waiting(2)
        house.server.handle_exit(signal.SIGTERM, None)
        house.until(lambda: house.client.get("/health/ready").status_code == 503, "not ready while draining")
        assert house.client.get("/health/ready").json()["status"] == "draining"
        assert house.client.get("/health/live").status_code == 200
        refused = house.draw()
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert "retry-after" in refused.headers
        house.gate.open()
        assert len(accepted.result().json()["data"]) == 2
        house.until(lambda: house.server.should_exit, "the end of the drain")


def test_a_drain_that_takes_too_long_gives_up(checkpoint: Path, model: DeviceModel) -> None:
    with serving(model, make_settings(checkpoint, drain_seconds=0.1)) as house:
        house.gate.close()
        running = house.in_background(lambda: house.draw("running"))
        house.until_waiting(1)
        waiting = house.in_background(lambda: house.draw("waiting"))
        house.until_waiting(2)
        house.server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.3)
        house.gate.open()
        assert {running.result().status_code, waiting.result().status_code} == {503}


def test_a_second_signal_gives_up_at_once_and_says_so(checkpoint: Path, model: DeviceModel) -> None:
    with serving(model, make_settings(checkpoint)) as house:
        house.gate.close()
        running = house.in_background(lambda: house.draw("running", schedule="teacher"))
        house.until_waiting(1)
        waiting = house.in_background(lambda: house.draw("waiting"))
        house.until_waiting(2)
        for _ in range(2):
            house.server.handle_exit(signal.SIGTERM, None)
        house.until(lambda: house.server.should_exit, "the end")
        house.gate.open()
        replies = [running.result(), waiting.result()]
    assert [reply.status_code for reply in replies] == [503, 503]
    assert {reply.json()["error"]["code"] for reply in replies} == {"draining"}
