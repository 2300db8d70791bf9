"""Cascades: the printed schedules and splits, from thresholds, and what a stored cascade may hold."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmd.backbones.registry import BACKBONES, get_backbone
from rmd.cascade import Cascade, teacher_cascade
from rmd.noise_schedule import RectifiedFlow, VariancePreserving
from rmd.presets import PRESETS, preset, preset_backbone, preset_noise_schedule
from rmd.size import Size
from rmd.students import NOT_SUPPORTED
from rmd.timesteps import map_timestep, uniform_teacher_timesteps

K256, K512, K1024 = (Size.square(side) for side in (256, 512, 1024))
WAN_LOW, WAN_HIGH = Size(832, 480, 81), Size(1280, 720, 81)


def timesteps(cascade: Cascade) -> list[int]:
    return [step.timestep for step in cascade.steps]


def teacher(cascade: Cascade) -> list[int]:
    return [step.teacher_timestep for step in cascade.steps]


def sides(cascade: Cascade) -> list[int]:
    return [step.size.short_side for step in cascade.steps]


@pytest.mark.parametrize(
    ("name", "thresholds", "mapped", "teachers", "step_sizes"),
    [
        ("sdxl", [-2.5], [1000, 857, 500, 250], [1000, 750, 500, 250], [K512, K512, K1024, K1024]),
        ("pixart", [-2.5], [1000, 857, 500, 250], [1000, 750, 500, 250], [K512, K512, K1024, K1024]),
        ("sd3", [-2.5], [1000, 947, 750, 500], [1000, 900, 750, 500], [K512, K512, K1024, K1024]),
        (
            "wan",
            [-4.0],
            [1000, 974, 937, 834, 716, 505],
            [1000, 962, 909, 834, 716, 505],
            [WAN_LOW] * 3 + [WAN_HIGH] * 3,
        ),
    ],
)
def test_table_6(
    name: str, thresholds: list[float], mapped: list[int], teachers: list[int], step_sizes: list[Size]
) -> None:
    for cascade in (preset(name), preset(name, thresholds=thresholds)):
        assert timesteps(cascade) == mapped
        assert teacher(cascade) == teachers
        assert [step.size for step in cascade.steps] == step_sizes


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_belongs_to_a_backbone_of_the_registry(name: str) -> None:
    assert preset_backbone(name) in BACKBONES
    assert preset_noise_schedule(name) == preset_noise_schedule(get_backbone(preset_backbone(name)).profile)


@pytest.mark.parametrize("tau", [-4.59, -4.0, -3.24])
def test_wans_printed_split_fixes_its_threshold(tau: float) -> None:
    assert preset("wan", thresholds=[tau]).schedule_name == "3+3"


@pytest.mark.parametrize("name", ["sdxl", "pixart", "sd3"])
@pytest.mark.parametrize(
    ("thresholds", "split"),
    [
        ([-6], "1+3"),
        ([-2.5], "2+2"),
        ([0], "3+1"),
        ([-6, -2.5], "1+1+2"),
        ([-6, 0], "1+2+1"),
        ([-2.5, 0], "2+1+1"),
        ([], "0+4"),
    ],
)
def test_tables_4_and_5(name: str, thresholds: list[float], split: str) -> None:
    cascade = preset(name, thresholds=thresholds)
    assert cascade.schedule_name == split
    counts = [count for count in map(int, split.split("+")) if count]
    assert [len(stage.steps) for stage in cascade.stages] == counts
    assert [stage.size for stage in cascade.stages] == [K256, K512, K1024][-len(counts) :]
    assert preset(name, schedule=split).steps == cascade.steps


@pytest.mark.parametrize(
    ("split", "mapped"),
    [
        ("2+2", [1000, 857, 500, 250]),
        ("1+3", [1000, 750, 500, 250]),
        ("3+1", [1000, 857, 667, 250]),
        ("0+4", [1000, 750, 500, 250]),
        ("1+1", [1000, 500]),
        ("4+4", [1000, 933, 857, 769, 500, 375, 250, 125]),
    ],
)
def test_embedded_splits(split: str, mapped: list[int]) -> None:
    cascade = preset("embedded", schedule=split)
    assert timesteps(cascade) == mapped
    assert cascade.schedule_name == split


def test_resolution_maps() -> None:
    assert timesteps(preset("sdxl", resolution_map="logsnr"))[1] == 897
    assert timesteps(preset("pixart", resolution_map="logsnr"))[1] == 836
    assert timesteps(preset("sdxl", resolution_map="none"))[1] == 750
    assert timesteps(preset("sdxl", resolution_map="inverse"))[1] == 600
    assert timesteps(preset("sdxl", thresholds=[-2.5, 0]))[:2] == [1000, 923]  # 256 px of 1024: s = 4


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 999), st.floats(1.01, 8))
def test_shift_is_the_exact_log_snr_map_on_rectified_flow(timestep: int, scale: float) -> None:
    exact = map_timestep(timestep, scale, "logsnr", RectifiedFlow())
    assert abs(map_timestep(timestep, scale, "shift") - exact) <= 1  # equal but for a tie in the rounding
    back = map_timestep(map_timestep(timestep, scale, "shift"), scale, "inverse")
    assert abs(back - timestep) <= scale  # rounding the mapped time costs at most the map's slope


def test_intervals_lie_between_the_thresholds_own_times() -> None:
    cascade = preset("sd3")
    boundary = RectifiedFlow().time_from_log_snr(-2.5)
    assert [stage.teacher_interval for stage in cascade.stages] == [(boundary, 0.98), (0.02, boundary)]


@pytest.mark.parametrize("name", list(PRESETS))
def test_intervals_are_disjoint_ordered_and_wide_enough(name: str) -> None:
    splits = ["1+3", "2+2", "3+1", "1+1+2", "1+2+1", "2+1+1"] if name in ("sdxl", "pixart", "sd3") else [None]
    for split in splits:
        stages = preset(name, schedule=split).stages
        assert stages[0].teacher_interval[1] == 0.98
        assert stages[-1].teacher_interval[0] == 0.02
        for stage in stages:
            assert stage.teacher_interval[1] - stage.teacher_interval[0] >= 0.02
        for above, below in pairwise(stages):
            assert above.teacher_interval[0] == below.teacher_interval[1]


def test_a_threshold_beyond_the_table_falls_back_to_the_next_stages_first_step() -> None:
    # SDXL's table ends at logSNR -5.4, so -6 has no time of its own.
    assert VariancePreserving.scaled_linear().time_from_log_snr(-6.0) == 1.0
    assert preset("sdxl", thresholds=[-6]).stages[0].teacher_interval == (0.75, 0.98)


def test_explicit_lists_are_cut_at_the_next_stages_first_teacher_time() -> None:
    cascade = preset("swd-sd3")
    assert [step.size.width // 8 for step in cascade.steps] == [64, 80, 96, 128]
    assert timesteps(cascade) == [1000, 895.9, 737.1, 602.2]
    assert [stage.teacher_interval[0] for stage in cascade.stages] == pytest.approx([0.8959, 0.7371, 0.6022, 0.02])
    assert cascade.transition_noise_intensity == 0
    assert cascade.x0_upsampling == "bicubic"
    assert [step.size.width // 8 for step in preset("swd-sd3-6").steps] == [32, 48, 64, 80, 96, 128]
    assert timesteps(preset("swd-sd3-6")) == [1000, 945.4, 895.9, 790.4, 737.1, 602.2]


def test_high_low_high() -> None:
    cascade = preset("bottleneck")
    assert sides(cascade) == [1024] * 3 + [512] * 5 + [1024] * 4
    assert [stage.size for stage in cascade.stages] == [K1024, K512, K1024]
    assert cascade.sizes == (K512, K1024)
    assert cascade.guidance_scale == 4.5
    # Coming back down in size, the mapped time is above the teacher's; at the full side it is the teacher's.
    for step in cascade.steps:
        assert (step.timestep > step.teacher_timestep) == (step.size == K512)


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_stored_cascade_comes_back_equal(name: str) -> None:
    cascade = preset(name)
    assert Cascade.from_dict(json.loads(json.dumps(cascade.to_dict()))) == cascade
    assert preset_noise_schedule(name) is not None


def test_students_run_unguided_but_for_those_published_with_guidance() -> None:
    guided = {name: preset(name).guidance_scale for name in PRESETS if preset(name).guidance_scale != 1.0}
    assert guided == {
        "bottleneck": 4.5,
        "progressive": 4.5,
        "hyper-sdxl-8-cfg": 5.0,
        "pcm-sdxl-4-cfg": 7.5,
        "hyper-sd3-4-cfg": 3.0,
        "hyper-sd3-8-cfg": 5.0,
        "hyper-sd3-16-cfg": 7.0,
        "pcm-sd3": 1.2,
        "pcm-sd3-stochastic": 1.2,
        "sd3.5-medium-turbo": 1.5,
    }


def test_what_cannot_be_sampled_as_published_is_named_with_its_reason() -> None:
    for name, reason in NOT_SUPPORTED.items():
        assert name not in PRESETS and len(reason) > 20
        for ask in (preset, preset_backbone, preset_noise_schedule):
            with pytest.raises(ValueError, match=f"preset '{re.escape(name)}' is not supported: {re.escape(reason)}"):
                ask(name)


def test_noise_intensities_are_one_number_or_one_a_transition() -> None:
    cascade = preset("sdxl-turbo-4")
    stored = json.loads(json.dumps(cascade.to_dict()))
    assert [round(a, 4) for a in stored["step_noise_intensity"]] == [0.2793, 0.3951, 0.4298]
    assert replace(cascade, step_noise_intensity=[0.1, 0.2, 0.3]).step_noise_intensity == (0.1, 0.2, 0.3)  # type: ignore[arg-type]
    one = Cascade.from_dict({**stored, "step_noise_intensity": 0.5})
    assert one.step_noise_intensity == 0.5 and json.dumps(one.to_dict()["step_noise_intensity"]) == "0.5"
    for key in ("x0_upsampling", "initial_noise_scale", "final_timestep", "step_noise_intensity"):
        del stored[key]  # a file of before: plain Euler to the prediction itself, from unit noise
    old = Cascade.from_dict(stored)
    assert (old.step_noise_intensity, old.x0_upsampling, old.initial_noise_scale, old.final_timestep) == (
        1.0, "bilinear", 1.0, None,
    )  # fmt: skip


def test_whole_timesteps_stay_whole() -> None:
    steps = preset("lightx2v-wan-14b").to_dict()["steps"]
    assert json.dumps([step["timestep"] for step in steps[:2]]) == "[1000, 937.5]"
    again = Cascade.from_dict({**preset("embedded").to_dict()}).steps[0].timestep
    assert isinstance(again, int)


@dataclass(frozen=True)
class Defaults:
    name: str = "sd3"
    teacher_steps: int = 40
    teacher_guidance: float = 4.5
    flow_shift: float = 3.0
    sizes: tuple[Size, ...] = (K1024, K512)


def test_teacher_cascade() -> None:
    cascade = teacher_cascade(Defaults(), steps=4)
    assert timesteps(cascade) == [1000, 900, 750, 500]
    assert cascade.guidance_scale == 4.5
    assert cascade.full_size == K1024
    assert len(cascade.stages) == 1
    assert teacher_cascade(Defaults()).num_steps == 40
    with pytest.raises(ValueError, match="do not fit"):
        uniform_teacher_timesteps(2000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": []}, "'steps'"),
        ({"steps": [3]}, r"steps\[0\]"),
        ({"steps": None}, "'steps'"),
        ({"full_size": "big"}, "'full_size'"),
        ({"full_size": "32x32"}, "'full_size'"),
        ({"resolution_map": "up"}, "'resolution_map'"),
        ({"noise_upsampling": "cubic"}, "'noise_upsampling'"),
        ({"flow_shift": 0}, "'flow_shift'"),
        ({"flow_shift": True}, "'flow_shift'"),
        ({"guidance_scale": "7"}, "'guidance_scale'"),
        ({"guidance_scale": float("nan")}, "'guidance_scale'"),
        ({"step_noise_intensity": 1.5}, "'step_noise_intensity'"),
        ({"step_noise_intensity": [1, 0.5]}, "one a transition: 3 of them, not 2"),
        ({"step_noise_intensity": [1, 0.5, 2]}, "'step_noise_intensity': must be from 0 to 1"),
        ({"step_noise_intensity": [1, "x", 0]}, "'step_noise_intensity'"),
        ({"step_noise_intensity": None}, "'step_noise_intensity'"),
        ({"x0_upsampling": "area"}, "'x0_upsampling'"),
        ({"initial_noise_scale": 0}, "'initial_noise_scale'"),
        ({"final_timestep": 250}, "'final_timestep'"),
        ({"final_timestep": "0"}, "'final_timestep'"),
        ({"thresholds": [-2.5, 0]}, "'thresholds'"),
        ({"stage_boundaries": [1.5]}, "'stage_boundaries'"),
        ({"name": ""}, "'name'"),
        ({"colour": 1}, "'colour' is unknown"),
    ],
)
def test_wrong_fields_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cascade.from_dict({**preset("embedded").to_dict(), **change})


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, {"timestep": 1001}, r"steps\[0\].timestep"),
        (1, {"timestep": 1000}, r"steps\[1\].timestep"),
        (1, {"timestep": "856.5"}, r"steps\[1\].timestep"),
        (1, {"timestep": float("nan")}, r"steps\[1\].timestep"),
        (2, {"teacher_timestep": 800}, r"steps\[2\].teacher_timestep"),
        (2, {"stage": 0}, r"steps\[2\].stage"),
        (0, {"stage": 1}, r"steps\[0\].stage"),
        (3, {"size": 128}, r"steps\[3\].size"),
    ],
)
def test_wrong_steps_are_named(index: int, change: dict[str, Any], message: str) -> None:
    data = preset("embedded").to_dict()
    data["steps"][index].update(change)
    with pytest.raises(ValueError, match=message):
        Cascade.from_dict(data)


def test_missing_fields_are_named() -> None:
    for key in ("name", "schedule_name", "steps", "full_size"):
        data = preset("embedded").to_dict()
        del data[key]
        with pytest.raises(ValueError, match=f"'{key}' is missing"):
            Cascade.from_dict(data)


def test_impossible_requests_say_why() -> None:
    with pytest.raises(ValueError, match="unknown preset"):
        preset("sd9")
    with pytest.raises(ValueError, match="leave stage 1 without a step"):
        preset("embedded", thresholds=[5])
    with pytest.raises(ValueError, match="increase"):
        preset("sdxl", thresholds=[0, -6])
    with pytest.raises(ValueError, match="its sizes are 128x128, 256x256"):
        preset("embedded", thresholds=[-3, -1.5])
    with pytest.raises(ValueError, match="explicit list"):
        preset("sdxl-turbo", thresholds=[-2])
    for split in ("two", "2+", "2+0", "-1+2"):
        with pytest.raises(ValueError, match="steps per stage"):
            preset("sdxl", schedule=split)
    with pytest.raises(ValueError, match="resolution_map"):
        preset("sdxl", resolution_map="sideways")
    with pytest.raises(ValueError, match="noise schedule"):
        Cascade.from_steps("x", [1000, 750, 500], [K512, K512, K1024], resolution_map="logsnr")
    with pytest.raises(ValueError, match="one size for each step"):
        Cascade.from_steps("x", [1000, 500], [K512])
    with pytest.raises(ValueError, match="guidance_scale"):
        replace(preset("sdxl"), guidance_scale=-1.0)
