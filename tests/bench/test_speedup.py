"""The bench's arithmetic, and the whole bench on tiny networks; no test asserts a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from bench.engines.batching import EngineBenchSettings, buckets_summary, engine_rows, loop_rows, run_engines
from bench.report import speedup_markdown
from bench.speedup.executors import EnginesOnDemand, make_executor
from bench.speedup.ratios import MEASURED, SUMMED, Measured, rows_of, schedule_seconds, speedups, step_key
from bench.speedup.run import SpeedupSettings, main, run_speedup
from bench.subjects import Runner, Subject, parameter_bytes, random_subject
from bench.timing import Interleaved, Timing, repeats_for, time_interleaved
from engines.build.checkpoint import build_checkpoint
from engines.errors import EngineMissing
from rmd.backbones.tiny import write_tiny_decoder, write_tiny_folder
from rmd.cascade import Cascade
from rmd.sampler import initial_noise
from rmd.size import Size

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LOW, FULL = Size.square(32), Size.square(64)


def _timing(seconds: float) -> Timing:
    return Timing.of([seconds])


def test_the_median_is_of_the_repeats_and_none_is_an_error() -> None:
    timing = Timing.of([3.0, 1.0, 10.0], first=99.0)
    assert (timing.median, timing.low, timing.high, timing.repeats, timing.first) == (3.0, 1.0, 10.0, 3, 99.0)
    with pytest.raises(ValueError, match="no repeats"):
        Timing.of([])


@pytest.mark.parametrize(("seconds", "expected"), [(0.01, 7), (3.0, 3), (100.0, 1)])
def test_slow_cases_are_repeated_less(seconds: float, expected: int) -> None:
    assert repeats_for(seconds, most=7, budget=10.0) == expected


def test_cases_take_turns_and_a_failing_one_does_not_stop_the_rest() -> None:
    order: list[str] = []

    def fail() -> None:
        raise RuntimeError("CUDA out of memory: tried to allocate")

    found = time_interleaved(
        {"a": lambda: order.append("a"), "broken": fail, "b": lambda: order.append("b")}, CPU, repeats=3
    )
    assert order[-6:] == ["a", "b", "a", "b", "a", "b"]
    assert set(found.timings) == {"a", "b"} and found.failures == {"broken": "out of memory"}
    assert found.timings["a"].repeats == 3


def test_a_case_that_fails_late_or_has_no_time_left_does_not_cost_the_rest() -> None:
    runs = {"late": 0}

    def fails_in_the_rounds() -> None:
        runs["late"] += 1
        if runs["late"] > 3:
            raise ValueError("the compiler gave up")

    found = time_interleaved({"late": fails_in_the_rounds, "a": lambda: None}, CPU, repeats=3)
    assert found.failures == {"late": "ValueError: the compiler gave up"} and found.timings["a"].repeats == 3

    deadline = time.monotonic() + 0.2
    found = time_interleaved({"slow": lambda: time.sleep(0.1)}, CPU, repeats=3, deadline=deadline)
    assert found.timings["slow"].repeats == 1, "its warm run stands for the repeats that there was no time for"


def test_nothing_is_begun_after_the_deadline() -> None:
    calls: list[str] = []
    found = time_interleaved({"late": lambda: calls.append("late")}, CPU, deadline=0.0)
    assert not calls and found.failures == {"late": "not begun: out of time"}


def _cascades() -> tuple[Cascade, Cascade]:
    student = Cascade.from_steps("x", (1000, 750, 500, 250), [LOW, LOW, FULL, FULL])
    teacher = Cascade.from_steps("x", tuple(range(1000, 0, -20)), [FULL] * 50, guidance_scale=3.0)
    return student, teacher


def test_a_schedule_that_was_not_run_is_the_sum_of_its_steps() -> None:
    student, teacher = _cascades()
    measured = Measured(
        {
            ("eager", 1, step_key(LOW, False)): _timing(0.25),
            ("eager", 1, step_key(FULL, False)): _timing(1.0),
            ("eager", 1, step_key(FULL, True)): _timing(1.5),
        }
    )
    assert schedule_seconds(measured, "eager", 1, "2+2", student) == (2.5, SUMMED)
    assert schedule_seconds(measured, "eager", 1, "teacher", teacher) == (75.0, SUMMED)
    measured.timings["eager", 1, "2+2"] = _timing(2.25)
    assert schedule_seconds(measured, "eager", 1, "2+2", student) == (2.25, MEASURED)
    assert schedule_seconds(measured, "compiled", 1, "2+2", student) is None


def test_speedups_divide_by_the_eager_and_by_the_own_teacher() -> None:
    subject = random_subject("embedded", "tiny", torch.float32, CPU)
    student, teacher = _cascades()
    single = Cascade.from_steps("x", (1000, 750, 500, 250), [FULL] * 4)
    subject = Subject(subject.backbone, teacher, {"0+4": single, "2+2": student}, "random")
    measured = Measured()
    for variant, scale in (("eager", 1.0), ("engines", 0.5)):
        for name, seconds in (("teacher", 10.0), ("0+4", 0.8), ("2+2", 0.5), ("decode", 0.25), ("text", 0.05)):
            measured.timings[variant, 1, name] = _timing(scale * seconds)
    measured.timings["diffusers", 1, "teacher"] = _timing(12.0)
    rows = rows_of(subject, measured, ["eager", "engines"], [1])
    found = speedups(rows)
    assert found["denoising_speedup"]["1"]["2+2"]["eager"]["over_eager_teacher"] == pytest.approx(20.0)
    engines = found["denoising_speedup"]["1"]["2+2"]["engines"]
    assert engines == {"over_eager_teacher": pytest.approx(40.0), "over_same_variant_teacher": pytest.approx(20.0)}
    # The guided teacher also encodes the empty prompt: 10 + 0.25 + 2 x 0.05 over 0.5 + 0.25 + 0.05.
    end_to_end = found["end_to_end_speedup"]["1"]["2+2"]["eager"]["over_eager_teacher"]
    assert end_to_end == pytest.approx(10.35 / 0.8)
    assert found["cascade_over_single_size"]["1"] == {"eager": pytest.approx(1.6), "engines": pytest.approx(1.6)}
    # A decoder that failed is eager's, not free.
    del measured.timings["engines", 1, "decode"]
    row = next(r for r in rows_of(subject, measured, ["engines"], [1]) if r["schedule"] == "2+2")
    assert row["end_to_end_s"] == pytest.approx(0.25 + 0.25 + 0.025) and row["from_eager"] == ["decode"]
    assert found["over_eager"]["1"]["engines"]["2+2"] == pytest.approx(2.0)
    stock = found["denoising_speedup"]["1"]["teacher"]["diffusers"]["over_eager_teacher"]
    assert stock == pytest.approx(10 / 12)
    # With the small decoder, over the eager teacher with the full one.
    measured.timings["eager", 1, "decode, small"] = _timing(0.01)
    with_small = speedups(rows_of(subject, measured, ["eager", "engines"], [1]))["end_to_end_small_speedup"]["1"]["2+2"]
    assert with_small["eager"] == {"over_eager_teacher": pytest.approx(10.35 / (0.5 + 0.01 + 0.05))}
    assert with_small["engines"] == {"over_eager_teacher": pytest.approx(10.35 / (0.25 + 0.01 + 0.025))}
    measured.timings["eager", 1, "pixels and PNG"] = _timing(0.2)
    shares = {row["variant"]: row for row in rows_of(subject, measured, ["engines"], [1]) if row["schedule"] == "2+2"}
    assert shares["engines"]["decoder_share"] == pytest.approx(0.25 / 0.525), "eager's, its own failed"
    assert shares["engines"]["denoiser_share"] == pytest.approx(0.25 / (0.525 + 0.2))


@pytest.mark.parametrize(("name", "encodings"), [("sdxl", 1), ("pixart", 2)])
def test_the_empty_prompt_costs_the_teacher_what_it_costs(name: str, encodings: int) -> None:
    """SDXL's is zeros: charging its teacher for an encoding would flatter the student."""
    subject = random_subject(name, "tiny", torch.float32, CPU)
    student, teacher = _cascades()
    subject = Subject(subject.backbone, teacher, {"2+2": student}, "random")
    times = {"teacher": 10.0, "2+2": 0.5, "decode": 0.25, "text": 0.05}
    measured = Measured({("eager", 1, what): _timing(seconds) for what, seconds in times.items()})
    words = {row["schedule"]: row["text_s"] for row in rows_of(subject, measured, ["eager"], [1])}
    assert words == {"teacher": pytest.approx(encodings * 0.05), "2+2": pytest.approx(0.05)}


def test_weights_held_twice_are_counted_once() -> None:
    layer = torch.nn.Linear(4, 3)
    twice = torch.nn.ModuleList([layer, layer])
    twin = torch.nn.Linear(4, 3)
    twin.weight = layer.weight
    assert parameter_bytes({"a": twice}) == {"a": 4 * 15}
    assert parameter_bytes({"a": torch.nn.ModuleList([layer, twin])}) == {"a": 4 * 18}


def test_the_diffusers_loop_computes_what_the_sampler_does() -> None:
    subject = random_subject("embedded", "tiny", torch.float32, CPU)
    backbone = subject.backbone
    full = backbone.full_size
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    steps = tuple(round(float(t)) for t in scheduler.timesteps)
    teacher = Cascade.from_steps("x", steps, [full] * 10, guidance_scale=3.0)
    runner = Runner(subject, make_executor("eager", backbone, CPU, "float32"))
    conditions = runner._conditions(2)
    runner._conditions = lambda batch: conditions  # type: ignore[method-assign]
    noise = initial_noise(backbone.latent_shape(full), [0, 1])
    stock = runner.diffusers_loop(teacher, 2, noise)()
    ours = runner.schedule(teacher, 2)()
    assert float((stock - ours).norm() / ours.norm()) < 0.02, "only the timesteps are rounded"


def test_engines_on_demand_compute_what_eager_does() -> None:
    subject = random_subject("embedded", "tiny", torch.float32, CPU)
    inputs = subject.backbone.example_inputs("decoder", LOW, 2)
    # The eager backend goes the same way as the compilers, without their minutes.
    executor = EnginesOnDemand(subject.backbone.component_modules(), "eager", CPU, "float32")
    compiled = executor.run("decoder", LOW, inputs)
    eager = make_executor("eager", subject.backbone, CPU, "float32").run("decoder", LOW, inputs)
    assert float((compiled - eager).norm() / eager.norm()) < 1e-4
    executor.release()
    assert executor.run("decoder", LOW, inputs).shape == eager.shape, "and again after their release"
    executor.release()


@pytest.mark.parametrize("variant", ["eager+graphs", "tensorrt", "tensorrt_rtx", "nonsense"])
def test_what_this_machine_cannot_run_is_a_sentence(variant: str) -> None:
    subject = random_subject("embedded", "tiny", torch.float32, CPU)
    with pytest.raises((ValueError, ImportError)):
        make_executor(variant, subject.backbone, CPU, "float32")


@pytest.mark.parametrize("backbone", ["embedded", "sdxl", "pixart", "sd3", "wan-14b", "wan-1.3b"])
def test_every_family_is_rehearsed_whole(backbone: str, tmp_path: Path) -> None:
    settings = SpeedupSettings(
        backbone=backbone, scale="tiny", dtype="float32", batches=(1, 2), repeats=1, out=tmp_path, whole_limit=0.5
    )
    content = run_speedup(settings)
    assert not content["failures"]
    assert json.loads(json.dumps(content)) == json.loads((tmp_path / f"speedup-{backbone}-cpu-tiny.json").read_text())
    splits = ["0+6", "3+3"] if backbone.startswith("wan") else ["0+4", "1+3", "2+2", "3+1"]
    for batch in ("1", "2"):
        assert list(content["end_to_end_speedup"][batch]) == ["teacher", *splits]
        assert content["cascade_over_single_size"][batch]["eager"] > 0
    kinds = {timing["what"] for timing in content["timings"]}
    assert ("pixels and PNG" in kinds) == (not backbone.startswith("wan"))
    assert {"text", "decode"} <= kinds and any(kind.endswith("guided") for kind in kinds)
    assert all(row["how"] in (MEASURED, SUMMED) for row in content["schedules"])
    text = speedup_markdown(content)
    assert "A rehearsal with tiny networks" in text and content["command"] in text
    assert ("The paper's figures" in text) == (backbone in ("sdxl", "pixart", "sd3", "wan-14b"))
    # Both decoders are printed, where diffusers has a small one for these latents.
    small = not backbone.startswith("wan")
    assert ("decode, small" in kinds) == ("end to end with the small one, ms" in text) == small
    assert (content["small_decoder"] == "") == (not small)
    for row in content["schedules"]:
        parts = (row["denoise_s"], row["decode_small_s"], row["text_s"])
        assert row["end_to_end_small_s"] == (pytest.approx(sum(parts)) if small else None)


def test_a_checkpoint_is_measured_with_its_own_schedules_and_teacher(tmp_path: Path) -> None:
    folder = write_tiny_folder("embedded", tmp_path / "checkpoint")
    settings = SpeedupSettings(
        checkpoint=folder, dtype="float32", batches=(1,), repeats=1, out=tmp_path, whole_limit=0.2, stock=False
    )
    content = run_speedup(settings)
    assert content["weights"] == str(folder)
    assert content["teacher"] == {"steps": 50, "guidance_scale": 3.0}
    assert {row["variant"] for row in content["schedules"]} == {"eager"}
    assert set(content["tokens"]) == {"32x32", "64x64"}


def test_a_checkpoints_small_decoder_is_measured_beside_its_full_one(tmp_path: Path) -> None:
    folder = write_tiny_folder("embedded", tmp_path / "checkpoint")
    decoder = write_tiny_decoder("embedded", tmp_path / "small")
    settings: dict[str, Any] = {
        "checkpoint": folder, "dtype": "float32", "batches": (1,), "repeats": 1, "out": tmp_path, "whole_limit": 0.01,
        "stock": False, "engines": tmp_path / "store", "backend": "eager", "buckets": (1,),
    }  # fmt: skip
    with pytest.raises(EngineMissing):
        run_speedup(SpeedupSettings(**settings, decoder=str(decoder)))
    build_checkpoint(folder, tmp_path / "store", "eager", dtype="float32", buckets=(1,), decoder=decoder)
    content = run_speedup(SpeedupSettings(**settings, decoder=str(decoder)))
    assert content["small_decoder"] == str(decoder)
    row = next(row for row in content["schedules"] if row["variant"] == "engines")
    assert row["from_eager"] == ["decode"]  # engines of the full decoder were not built
    build_checkpoint(folder, tmp_path / "store", "eager", dtype="float32", buckets=(1,), decoder="full")
    content = run_speedup(SpeedupSettings(**settings, decoder=str(decoder)))
    assert all(row["from_eager"] == [] for row in content["schedules"] if row["variant"] == "engines")
    assert not content["failures"]


def test_engines_need_their_checkpoint() -> None:
    with pytest.raises(ValueError, match="needs the --checkpoint"):
        run_speedup(SpeedupSettings(scale="tiny", engines=Path("engines-cache")))


# What diffusers itself requires (filelock, Pillow, numpy, ...) stays.
BLOCKED = (
    "typer",
    "rich",
    "pydantic",
    "pydantic_settings",
    "transformers",
    "peft",
    "matplotlib",
    "psutil",
    "ftfy",
    "av",
)
BARE = """
import importlib.util
import sys
from importlib import metadata

BLOCKED = {blocked!r}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
find_spec, version = importlib.util.find_spec, metadata.version

def spec_of(name, package=None):
    return None if name.partition(".")[0] in BLOCKED else find_spec(name, package)

def version_of(name):
    if name.lower() in BLOCKED:
        raise metadata.PackageNotFoundError(name)
    return version(name)

importlib.util.find_spec, metadata.version = spec_of, version_of
import torch
torch.set_num_threads(1)
from bench.speedup.run import main
raise SystemExit(main(sys.argv[1:]))
"""


def test_it_runs_on_torch_and_diffusers_alone(tmp_path: Path) -> None:
    options = ["--backbone", "sd3", "--scale", "tiny", "--batches", "1", "--repeats", "1", "--whole-limit", "0.01"]
    done = subprocess.run(
        [sys.executable, "-c", BARE.format(blocked=BLOCKED), *options, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    content: dict[str, Any] = json.loads((tmp_path / "speedup-sd3-cpu-tiny.json").read_text())
    assert content["notes"] and "transformers is not installed" in content["notes"][0]
    assert all(row["text_s"] is None for row in content["schedules"])
    assert not (tmp_path / "speedup-sd3-cpu-tiny.png").exists()


def test_the_module_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--scale", "tiny", "--dtype", "float32", "--batches", "1", "--repeats", "1", "--whole-limit", "0.01"]
    assert main([*options, "--no-stock", "--out", str(tmp_path)]) == 0
    assert "# Speed of embedded cascades" in capsys.readouterr().out


def test_engine_rows_stand_beside_eager_and_loops_beside_diffusers(tmp_path: Path) -> None:
    found = Interleaved(
        {
            ("eager", "denoiser", "64x64", 1): _timing(0.02),
            ("inductor", "denoiser", "64x64", 1): _timing(0.01),
            ("eager", "denoiser", "64x64", 4): _timing(0.04),
            ("inductor", "denoiser", "64x64", 4): _timing(0.02),
        }
    )
    rows = engine_rows(found, [])
    by = {(row["backend"], row["batch"]): row for row in rows}
    assert by["inductor", 1]["over_eager"] == pytest.approx(2.0)
    assert by["inductor", 4]["rows_per_second"] == pytest.approx(200.0)
    assert buckets_summary(rows)["inductor denoiser 64x64"] == pytest.approx(2.0)
    loops = loop_rows(Interleaved({("diffusers", "teacher", 1): _timing(3.0), ("inductor", "2+2", 1): _timing(0.1)}))
    assert next(row for row in loops if row["schedule"] == "2+2")["over_diffusers"] == pytest.approx(30.0)


@pytest.mark.parametrize("small", [False, True])
def test_built_engines_are_measured_beside_eager_and_the_diffusers_loop(tmp_path: Path, small: bool) -> None:
    folder = write_tiny_folder("embedded", tmp_path / "checkpoint")
    if small:
        write_tiny_decoder("embedded", tmp_path / "decoder")
        card = json.loads((folder / "cascade.json").read_text())
        (folder / "cascade.json").write_text(json.dumps({**card, "decoder": "../decoder"}))
    store = tmp_path / "engines"
    build_checkpoint(folder, store, "eager", dtype="float32", buckets=(1, 2))
    content = run_engines(
        EngineBenchSettings(
            folder, store, ("eager",), dtype="float32", buckets=(1, 2), repeats=1, loop_batches=(1,), out=tmp_path
        )
    )
    assert not content["failures"]
    assert {row["backend"] for row in content["engines"]} == {"eager", "eager engines"}
    assert {row["component"] for row in content["engines"]} == {"text_encoder", "denoiser", "decoder"}
    assert {(row["backend"], row["schedule"]) for row in content["loops"]} == {
        ("eager", "teacher"), ("eager", "2+2"), ("eager engines", "teacher"), ("eager engines", "2+2"),
        ("diffusers", "teacher"),
    }  # fmt: skip
    assert set(content["memory"]) == {"eager", "eager engines"}
    drawn = {(row["backend"], row["batch"], row["against"]): row["max_levels"] for row in content["pictures"]}
    assert set(drawn) == {
        (kind, batch, against)
        for kind in ("eager", "eager engines") for batch in (1, 2) for against in ("float32", "alone")
    }  # fmt: skip
    assert max(drawn.values()) < 0.1
    text = (tmp_path / "engines-cpu.md").read_text()
    assert "weights counted once" in text and "| denoiser | 64x64 | 2 |" in text

    settings = SpeedupSettings(
        checkpoint=folder, engines=store, backend="eager", buckets=(1, 2), dtype="float32", batches=(1,), repeats=1,
        whole_limit=0.1, out=tmp_path,
    )  # fmt: skip
    speedup = run_speedup(settings)
    assert {"eager", "engines"} <= {row["variant"] for row in speedup["schedules"]}
    assert speedup["over_eager"]["1"]["engines"]["2+2"] > 0
