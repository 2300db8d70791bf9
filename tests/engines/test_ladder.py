"""Stepping down from a backend that fails to the next, when building and when serving.

Every rung is the reference compiler under another name: what is tested is who is asked for what, and when.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from engines import compilers
from engines.build.checkpoint import build_checkpoint
from engines.build.missing import BuildReport
from engines.build.one import build_engine
from engines.build.progress import BuildProgress
from engines.compilers import backend_ladder
from engines.compilers.eager import EagerCompiler
from engines.errors import EngineError, NotEnoughDisk, NotEnoughMemory
from engines.manifest import Manifest
from engines.plan.checkpoint import CheckpointPlan
from engines.plan.memory import MemoryPlan
from engines.plan.options import EngineOptions
from engines.run.choice import loadable_ladder, loadable_options
from engines.run.live import LiveExecutor
from engines.spec import EngineSpec, WeightsMode
from engines.store import EngineStore
from rmd.backbones.registry import load_checkpoint
from rmd.checkpoint import CheckpointFolder
from rmd.size import Size
from tests.engines.conftest import net_spec

SIZE = Size(64, 64)
FULL = ("denoiser", "64x64")


class Best(EagerCompiler):
    """The first choice.

    Attributes:
        failure: what it raises for a denoiser, and for all else where ``everywhere``.
    """

    name = "best"
    failure: Exception | None = None
    everywhere = False

    def build(self, module: nn.Module, spec: EngineSpec, folder: Path) -> Manifest:
        if self.failure is not None and (self.everywhere or spec.component == "denoiser"):
            raise self.failure
        return super().build(module, spec, folder)


class Second(EagerCompiler):
    """The next one."""

    name = "second"


class Spot(EagerCompiler):
    """The last one, made where it is loaded, as CUDA graphs are."""

    name = "spot"

    def on_the_spot(self, device: str) -> bool:
        return True


@pytest.fixture(autouse=True)
def ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" means these three."""
    for kind in (Best, Second, Spot):
        monkeypatch.setitem(compilers.COMPILERS, kind.name, kind)
    monkeypatch.setitem(compilers._ORDER, "cpu", ("best", "second", "spot"))
    monkeypatch.setattr(Best, "failure", None)
    monkeypatch.setattr(Best, "everywhere", False)


def test_a_backend_that_is_named_stands_alone() -> None:
    assert backend_ladder("auto", "cpu") == (("best", "second", "spot"), "")
    assert backend_ladder("second", "cpu") == (("second",), "")


@pytest.mark.parametrize(
    "failure",
    [
        EngineError("no converter for an operator"),
        RuntimeError("internal compiler error"),
        torch.OutOfMemoryError("CUDA out of memory"),
        NotEnoughMemory("the engines need too much"),
    ],
)
def test_auto_goes_on_with_the_next_backend_and_a_named_one_fails(
    tiny_checkpoint: Path,
    tmp_path: Path,
    failure: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Best, "failure", failure)
    monkeypatch.setattr(Best, "everywhere", True)
    store = EngineStore(tmp_path)
    with pytest.raises(EngineError, match=str(failure)):
        build_checkpoint(tiny_checkpoint, store, "best", dtype="float32", buckets=(1,))
    said: list[str] = []
    with caplog.at_level(logging.WARNING):
        report = build_checkpoint(tiny_checkpoint, store, dtype="float32", buckets=(1,), announce=said.append)
    assert report.backend == "second" and "best is given up for second: " in report.note and str(failure) in report.note
    assert caplog.text.count("is given up for") == 1 and report.note in caplog.text and report.note in said[-1]
    assert report.built and all(m.spec.backend == "second" and m.latency_seconds for m in report.built)
    folder = CheckpointFolder.read(tiny_checkpoint)
    options, note = loadable_options(folder, store, dtype="float32", buckets=(1,))
    assert options.backend == "second" and note == "best engines are not built, second's are"
    assert [each.backend for each in loadable_ladder(folder, store)[0]] == ["best", "second", "spot"]
    assert loadable_options(folder, EngineStore(tmp_path / "none"), dtype="float32")[0].backend == "best"


def test_a_full_disk_is_no_reason_to_step_down(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Best, "failure", NotEnoughDisk("no space left"))
    with pytest.raises(NotEnoughDisk):
        build_checkpoint(tiny_checkpoint, tmp_path, dtype="float32", buckets=(1,))


def test_beside_a_server_the_next_backend_builds_what_the_first_could_not(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Best, "failure", RuntimeError("no kernel"))
    seen: list[BuildProgress] = []
    report = build_checkpoint(
        tiny_checkpoint, tmp_path, "auto", seen.append, dtype="float32", buckets=(1, 2), while_serving=True
    )
    assert not report.failed
    made = {(m.spec.component, m.spec.backend) for m in report.built}
    assert {backend for component, backend in made if component == "denoiser"} == {"second"}
    assert {backend for component, backend in made if component != "denoiser"} == {"best"}
    done = [told.done for told in seen]
    assert done == sorted(done) and seen[-1].done == seen[-1].total
    backbone, checkpoint = load_checkpoint(tiny_checkpoint, dtype=torch.float32)
    plan, *below = plans(checkpoint, backbone)
    live = LiveExecutor(plan, EngineStore(tmp_path), below=below)
    live.adopt_all()
    assert live.complete and live.places() == live.planned()
    assert {m.spec.backend for m in live.manifests()} == {"best", "second"}


def plans(checkpoint: CheckpointFolder, backbone: object) -> list[CheckpointPlan]:
    options = [EngineOptions(name, "cpu", "float32", (1, 2)) for name in ("best", "second", "spot")]
    return [CheckpointPlan(checkpoint, each, backbone) for each in options]  # type: ignore[arg-type]


def test_serving_takes_the_best_that_there_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    backbone, checkpoint = load_checkpoint(tiny_checkpoint, dtype=torch.float32)
    inputs = backbone.example_inputs("denoiser", SIZE, 3)
    expected = backbone.run("denoiser", SIZE, inputs)
    rungs = plans(checkpoint, backbone)
    store = EngineStore(tmp_path)
    live = LiveExecutor(rungs[0], store, below=rungs[1:])

    def build(rung: int, component: str, size: Size | None) -> None:
        plan = rungs[rung]
        (spec,) = [e.spec for e in plan.engines if (e.component, e.size) == (component, size)]
        build_engine(plan.compiler, store, plan.modules[component], spec)

    def serving() -> set[str]:
        assert torch.allclose(live.run("denoiser", SIZE, inputs), expected, atol=1e-5)
        return {m.spec.backend for m in live.manifests() if (m.spec.component, m.spec.size) == FULL}

    assert live.adopt_all() == len(rungs[2].engines), "without anything built"
    assert live.places() == live.planned() and serving() == {"spot"} and live.serving == "spot"
    assert not live.complete, "that only stands in"
    build(1, "denoiser", SIZE)
    assert live.adopt_next() == FULL and serving() == {"second"} and live.adopt_next() is None
    build(0, "denoiser", SIZE)
    assert live.adopt_next() == FULL and serving() == {"best"} and live.adopt_next() is None
    for planned in rungs[1].engines:
        build(1, planned.component, planned.size)
    while live.adopt_next() is not None:
        assert serving() == {"best"}
    assert live.complete and live.buckets("denoiser", SIZE) == (1, 2)
    assert live.serving == "second", "at one size of two, which is the tie that the worse one wins"
    again = LiveExecutor(rungs[0], store, below=rungs[1:])
    assert again.adopt_all() == len(rungs[1].engines) and again.complete, "the one best, the others second"


def test_what_runs_long_is_not_recorded_on_the_spot(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, checkpoint = load_checkpoint(tiny_checkpoint, dtype=torch.float32)
    inputs = backbone.example_inputs("denoiser", SIZE, 3)
    monkeypatch.setattr("engines.run.live.RECORDED_SECONDS", 0.0)
    live = LiveExecutor(plans(checkpoint, backbone)[2], EngineStore(tmp_path), wanted=[FULL])
    with caplog.at_level(logging.WARNING):
        assert live.adopt_all() == 0 and live.adopt_next() is None
    assert "beside which launching its kernels is nothing" in caplog.text and live.places() == {FULL: ()}
    assert live.run("denoiser", SIZE, inputs).shape[0] == 3


def test_engines_whose_weights_could_not_be_packed_are_counted(net: nn.Module) -> None:
    spec = net_spec(net)
    assert spec.weights_mode == "packed"
    manifests = [
        Manifest(spec, {}, spec.inputs, spec.inputs[0], mode) for mode in (WeightsMode.PACKED, WeightsMode.SHARED)
    ]
    report = BuildReport(tuple(manifests), 0, 1.0, "inductor", MemoryPlan({}, 0, 0, 0, "cpu"))
    assert report.unpacked == (manifests[1],)
