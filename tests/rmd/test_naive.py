"""Naive cascades: a public student's steps at smaller sides, and what they say of themselves."""

from __future__ import annotations

import json

import pytest
import torch

from rmd.cascade import Cascade
from rmd.naive import naive_cascade
from rmd.noise_schedule import RectifiedFlow
from rmd.presets import NOT_DISTILLED, preset
from rmd.sampler import advance, needs_noise
from rmd.size import Size
from rmd.timesteps import shift_time


def test_the_low_stage_stands_at_eq_2s_times_and_the_full_one_at_the_students() -> None:
    student, naive = preset("dmd2-sdxl"), naive_cascade("dmd2-sdxl", "2+2")
    assert (naive.name, naive.schedule_name) == ("dmd2-sdxl-naive", "2+2")
    assert [step.size.width for step in naive.steps] == [512, 512, 1024, 1024]
    assert [step.timestep for step in naive.steps] == [999, round(1000 * shift_time(0.749, 2.0)), 499, 249]
    assert [step.teacher_timestep for step in naive.steps] == [step.timestep for step in student.steps]
    assert naive.note.startswith(NOT_DISTILLED) and "dmd2-sdxl" in naive.note and student.note == ""
    assert Cascade.from_dict(json.loads(json.dumps(naive.to_dict()))) == naive


def test_a_fresh_noise_students_hand_over_is_eq_4_with_fresh_noise_alone() -> None:
    naive = naive_cascade("lightx2v-wan-14b", "2+2")
    assert [str(step.size) for step in naive.steps] == ["416x240x81"] * 2 + ["832x480x81"] * 2
    assert all(needs_noise(naive, index) for index in range(3))
    small = {Size(416, 240, 81): (2, 3, 4, 4), Size(832, 480, 81): (2, 3, 8, 8)}
    x, x0, noise = torch.randn(1, 2, 3, 4, 4), torch.randn(1, 2, 3, 4, 4), torch.randn(1, 2, 3, 8, 8)
    got = advance(naive, 1, x, x0, RectifiedFlow(), small.__getitem__, noise)
    large = torch.nn.functional.interpolate(x0[0].transpose(0, 1), scale_factor=2, mode="bilinear").transpose(0, 1)[
        None
    ]
    t = preset("lightx2v-wan-14b").steps[2].t
    torch.testing.assert_close(got, (1 - t) * large + t * noise, rtol=0, atol=1e-5)


def test_noise_rules_start_and_end_follow_the_moved_times() -> None:
    student, turbo = preset("sdxl-turbo-4").step_noise_intensity, naive_cascade("sdxl-turbo-4", "2+2")
    assert [step.size.width for step in turbo.steps] == [256, 256, 512, 512]
    assert isinstance(turbo.step_noise_intensity, tuple) and isinstance(
        preset("sdxl-turbo-4").step_noise_intensity, tuple
    )
    # The low side's second step is noisier than the student's, so more of the first one's noise is kept.
    assert turbo.step_noise_intensity[0] > student[0]
    assert turbo.step_noise_intensity[2] == student[2]
    assert turbo.initial_noise_scale == pytest.approx(0.99767, abs=1e-5)
    rcm = naive_cascade("rcm-wan-14b", "2+2")
    assert rcm.initial_noise_scale == rcm.steps[0].t == 0.992
    assert naive_cascade("hyper-sdxl-8", "2+2+4").final_timestep == 0
    assert naive_cascade("sd3.5-medium-turbo", "4+4").guidance_scale == 1.5


@pytest.mark.parametrize(
    ("name", "schedule", "message"),
    [
        ("sdxl", "2+2", "is no public student"),
        ("bottleneck", "2+2", "is no public student"),
        ("swd-sd3", "2+2", "was distilled for several sizes"),
        ("dmd2-sdxl", "2+3", "has 4 steps, and schedule '2\\+3' 5"),
        ("dmd2-sdxl", "0+4", "has one stage"),
        ("dmd2-sdxl", "two", "is not steps per stage"),
        ("lightx2v-wan-14b", "1+1+2", "multiples of 16"),
        ("fastwan", "2+2", "not supported"),
        ("nothing", "2+2", "unknown preset"),
    ],
)
def test_what_no_naive_cascade_can_be_made_of_is_said(name: str, schedule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        naive_cascade(name, schedule)


def test_sampling_without_training_says_so() -> None:
    for name in ("bottleneck", "progressive"):
        cascade = preset(name)
        assert cascade.note == f"{NOT_DISTILLED}: the base's own weights" and cascade.guidance_scale == 4.5
    progressive = preset("progressive")
    assert [step.size.width for step in progressive.steps] == [512] * 6 + [1024] * 6
    for step in progressive.steps[1:6]:
        assert step.timestep == round(1000 * shift_time(step.teacher_timestep / 1000, 2.0))
