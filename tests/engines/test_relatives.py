"""An engine with weights inside is made of one with other weights, where that takes them; else it is built.

The reference compiler stands in for TensorRT: what is tested is which of the two ways is gone, and what is left behind.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from engines import compilers
from engines.build.one import build_engine
from engines.compilers.base import Compiler, EngineRequest
from engines.compilers.eager import EagerCompiler
from engines.errors import EngineError
from engines.manifest import Manifest
from engines.spec import EngineSpec, WeightsMode
from engines.store import EngineStore
from tests.engines.conftest import Net, net_request


class Inside(EagerCompiler):
    """Refittable by name; notes what was done.

    Attributes:
        refusal: what a refit ends with.
    """

    name = "inside"
    refusal: EngineError | None = None

    def __init__(self) -> None:
        self.done: list[str] = []

    def weights_mode(self, request: EngineRequest) -> WeightsMode:
        return WeightsMode.REFITTABLE

    def build(self, module: nn.Module, spec: EngineSpec, folder: Path) -> Manifest:
        self.done.append("built")
        assert not list(folder.iterdir()), "what a refused refit left is in the way"
        (folder / "plan").write_text("built")
        return super().build(module, spec, folder).updated(weights_mode=WeightsMode.REFITTABLE)

    def refitted(self, manifest: Manifest, built: Path, module: nn.Module, spec: EngineSpec, folder: Path) -> Manifest:
        self.done.append("refitted")
        (folder / "plan").write_text((built / "plan").read_text() + ", refitted")
        if self.refusal is not None:
            raise self.refusal
        return manifest.updated(spec=spec)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Inside:
    monkeypatch.setitem(compilers.COMPILERS, "inside", Inside)
    return Inside()


def spec_of(compiler: Compiler, module: nn.Module, weights: str, batch: int = 2) -> EngineSpec:
    return compiler.plan(replace(net_request(module, batch), weights=weights))


def network(seed: int) -> nn.Module:
    return Net(seed).eval().requires_grad_(False)


def test_new_weights_go_into_the_engine_of_the_same_network(compiler: Inside, tmp_path: Path) -> None:
    store, first, second = EngineStore(tmp_path), network(0), network(1)
    old = build_engine(compiler, store, first, spec_of(compiler, first, "old"))
    new = build_engine(compiler, store, second, spec_of(compiler, second, "new"))
    assert compiler.done == ["built", "refitted"] and new.key != old.key and new.spec.weights == "new"
    assert [(store.folder(each.key) / "plan").read_text() for each in (old, new)] == ["built", "built, refitted"]
    assert store.verify() == [] and new.relative_l2 == 0.0
    build_engine(compiler, store, first, spec_of(compiler, first, "old", batch=4))
    assert compiler.done[2:] == ["built"], "another batch is another engine"


def test_weights_that_are_refused_are_built(compiler: Inside, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler.refusal = EngineError("'shift' changes, whose place in the plan is not known")
    store, first, second = EngineStore(tmp_path), network(0), network(1)
    build_engine(compiler, store, first, spec_of(compiler, first, "old"))
    with caplog.at_level(logging.INFO):
        new = build_engine(compiler, store, second, spec_of(compiler, second, "new"))
    assert compiler.done == ["built", "refitted", "built"]
    assert "is built anew for these weights: 'shift' changes" in caplog.text
    assert (store.folder(new.key) / "plan").read_text() == "built"


def test_a_refit_that_is_wrong_is_not_published(
    compiler: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, first, second = EngineStore(tmp_path), network(0), network(1)
    build_engine(compiler, store, first, spec_of(compiler, first, "old"))
    errors = iter([float("nan"), 0.0])
    monkeypatch.setattr("engines.build.one.worst_relative_l2", lambda *_: next(errors))
    build_engine(compiler, store, second, spec_of(compiler, second, "new"))
    assert compiler.done == ["built", "refitted", "built"]


def test_engines_that_hold_no_weights_are_never_refitted(tmp_path: Path) -> None:
    store, plain = EngineStore(tmp_path), EagerCompiler()
    module = network(0)
    spec = spec_of(plain, module, "old")
    assert spec.weights is None and spec.key == spec_of(plain, module, "new").key
    with pytest.raises(EngineError, match="eager engines are built anew for other weights"):
        plain.refitted(build_engine(plain, store, module, spec), tmp_path, module, spec, tmp_path)
    assert store.relatives(spec) == []
