"""Starting eager and taking engines over as they come into the store."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engines.build.one import build_engine
from engines.compilers.eager import EagerEngine
from engines.errors import EngineError
from engines.manifest import MANIFEST
from engines.plan.checkpoint import CheckpointPlan
from engines.plan.options import EngineOptions
from engines.run.live import LiveExecutor
from engines.store import EngineStore
from rmd.backbones import tiny
from rmd.backbones.base import Backbone
from rmd.backbones.registry import load_checkpoint
from rmd.backbones.tiny import write_tiny_folder
from rmd.size import Size

SIZE = Size(64, 64)
FULL = ("denoiser", "64x64")


class Profiled:
    """The tiny SD3 checkpoint, eager engines with one profile a batch, and a store that fills one by one."""

    def __init__(self, folder: Path, built: Path, root: Path) -> None:
        self.folder, self.built, self.root = folder, built, root
        self.backbone: Backbone
        self.backbone, self.checkpoint = load_checkpoint(folder, dtype=torch.float32)
        self.plan = CheckpointPlan(self.checkpoint, EngineOptions("eager", "cpu", "float32", (1, 2)), self.backbone)
        self.store = EngineStore(root)

    def publish(self, component: str, size: str | None) -> Path:
        (spec,) = [e.spec for e in self.plan.engines if (e.component, e.spec.size) == (component, size)]
        shutil.copytree(self.built / spec.key, self.root / spec.key, dirs_exist_ok=True)
        return self.root / spec.key


@pytest.fixture
def profiled(tiny_checkpoint: Path, eager_store: Path, tmp_path: Path) -> Profiled:
    return Profiled(tiny_checkpoint, eager_store, tmp_path / "store")


def test_it_starts_eager_and_takes_one_engine_at_a_time(profiled: Profiled) -> None:
    live = LiveExecutor(profiled.plan, profiled.store)
    inputs = profiled.backbone.example_inputs("denoiser", SIZE, 3)
    expected = profiled.backbone.run("denoiser", SIZE, inputs)
    profiled.backbone.executor = live
    assert live.adopt_next() is None and not live.complete and live.buckets("denoiser", SIZE) == ()
    assert torch.equal(live.run("denoiser", SIZE, inputs), expected)
    assert live.planned()[FULL] == (1, 2) and live.places()[FULL] == ()

    profiled.publish("decoder", "64x64")
    profiled.publish(*FULL)
    assert live.adopt_next() == FULL, "what a picture spends most on comes first"
    assert live.buckets("denoiser", SIZE) == (1, 2) == live.places()[FULL]
    assert live.adopt_next() == ("decoder", "64x64") and live.adopt_next() is None and not live.complete
    assert torch.allclose(live.run("denoiser", SIZE, inputs), expected, atol=1e-5)

    for place in live.planned():
        profiled.publish(*place)
    while live.adopt_next() is not None:
        pass
    assert live.complete and live.places() == live.planned()
    assert set(live.memory()) == set(profiled.plan.modules)
    live.unload()
    assert live.buckets("denoiser", SIZE) == ()


def test_what_is_there_at_the_start_is_taken_at_once(profiled: Profiled, tmp_path: Path) -> None:
    shutil.copytree(profiled.built, profiled.root)
    live, told = LiveExecutor(profiled.plan, profiled.store), []
    count = live.adopt_all(lambda done, total, title: told.append((done, total)))
    assert live.complete and count == len(profiled.plan.engines) == len(told) and told[0] == (0, count)
    assert live.adopt_all() == 0 and live.adopt_next() is None


def test_only_what_is_wanted_gets_engines(profiled: Profiled) -> None:
    shutil.copytree(profiled.built, profiled.root)
    live = LiveExecutor(profiled.plan, profiled.store, foreign=True, wanted=[FULL])
    assert live.adopt_all() == 1 and live.complete and live.places() == {FULL: (1, 2)}
    assert live.run("decoder", SIZE, profiled.backbone.example_inputs("decoder", SIZE, 1)).shape[0] == 1


def test_a_damaged_engine_is_told_once_and_taken_when_it_was_mended(
    profiled: Profiled, caplog: pytest.LogCaptureFixture
) -> None:
    folder = profiled.publish(*FULL)
    sound = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(sound.replace('"denoiser"', '"decoder"', 1))
    live = LiveExecutor(profiled.plan, profiled.store)
    with caplog.at_level(logging.WARNING):
        assert live.adopt_next() is None and live.adopt_next() is None and live.adopt_all() == 0
    assert "was altered" in caplog.text and live.buckets("denoiser", SIZE) == ()
    (folder / "mended").write_text(sound)
    (folder / "mended").replace(folder / MANIFEST)
    assert live.adopt_next() == FULL


def test_a_wrong_engine_never_serves(
    profiled: Profiled, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = EagerEngine._run
    monkeypatch.setattr(EagerEngine, "_run", lambda self, inputs: right(self, inputs) * 1.01)
    profiled.publish(*FULL)
    live = LiveExecutor(profiled.plan, profiled.store)
    with caplog.at_level(logging.WARNING):
        assert live.adopt_next() is None and live.adopt_next() is None
    assert caplog.text.count("differs from eager by 1.0e-02") == 1
    inputs = profiled.backbone.example_inputs("denoiser", SIZE, 2)
    assert torch.equal(live.run("denoiser", SIZE, inputs), profiled.backbone.run("denoiser", SIZE, inputs))


def test_an_engine_that_breaks_while_it_loads_does_not_reach_serving(
    profiled: Profiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(engine: EagerEngine, runs: int = 2) -> None:
        raise RuntimeError("a kernel is missing")

    monkeypatch.setattr(EagerEngine, "warmup", broken)
    profiled.publish(*FULL)
    live = LiveExecutor(profiled.plan, profiled.store)
    assert live.adopt_next() is None
    assert live.run("denoiser", SIZE, profiled.backbone.example_inputs("denoiser", SIZE, 2)).shape[0] == 2


def test_learnt_costs_decide_and_the_same_costs_decide_alike(profiled: Profiled) -> None:
    shutil.copytree(profiled.built, profiled.root)
    live = LiveExecutor(profiled.plan, profiled.store)
    live.adopt_all()
    live.learn("denoiser", SIZE, 1, 1.0)
    live.learn("denoiser", SIZE, 2, 1.1)
    assert live.split(FULL, 3) == (2, 1) == live.split(FULL, 3) and live.split(FULL, 4) == (2, 2)
    assert live.costs("denoiser", SIZE) == {1: 1.0, 2: 1.1}
    live.learn("denoiser", SIZE, 2, 2.5)
    assert live.split(FULL, 4) == (1, 1, 1, 1)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="no cost"):
            live.learn("denoiser", SIZE, 1, seconds)
    with pytest.raises(EngineError, match="unknown component 'unet'; this model has"):
        live.run("unet", SIZE, {})


# ---- compiled ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled_denoisers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The tiny embedded checkpoint, of one block, and a store of its full-size denoisers of batch 1 and 4."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("live")
    with pytest.MonkeyPatch.context() as patch:  # what is shared and replaced are weights, of however many blocks
        patch.setitem(tiny._OVERRIDES["embedded"]["transformer"], "num_layers", 1)
        folder = write_tiny_folder("embedded", root / "model")
    plan, _ = _plan(folder)
    store = EngineStore(root / "store")
    for engine in plan.engines:
        if engine.component == "denoiser" and engine.size == max(plan.sizes):
            build_engine(plan.compiler, store, plan.modules["denoiser"], engine.spec)
    yield folder, root / "store"


def _plan(folder: Path) -> tuple[CheckpointPlan, Backbone]:
    backbone, checkpoint = load_checkpoint(folder, dtype=torch.float32)
    return CheckpointPlan(checkpoint, EngineOptions("inductor", "cpu", "float32", (1, 4)), backbone), backbone


def test_compiled_engines_share_the_weights_and_then_replace_them(
    compiled_denoisers: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, built = compiled_denoisers
    reference, _ = load_checkpoint(folder, dtype=torch.float32)
    plan, backbone = _plan(folder)
    full = max(plan.sizes)
    place = ("denoiser", str(full))
    inputs = backbone.example_inputs("denoiser", full, 8)
    expected = reference.run("denoiser", full, inputs)
    store = EngineStore(tmp_path / "store")
    kept = LiveExecutor(_plan(folder)[0], store, wanted=[place], keep_eager=frozenset({"denoiser"}))
    live = LiveExecutor(plan, store, wanted=[place])
    backbone.executor = live
    first, second = [e.spec.key for e in plan.engines if (e.component, e.size) == ("denoiser", full)]
    for key, buckets in ((first, (1,)), (second, (1, 4))):
        shutil.copytree(built / key, store.root / key)
        assert live.adopt_next() == kept.adopt_next() == place and live.buckets("denoiser", full) == buckets
        assert live.complete == (key == second)
        assert torch.allclose(live.run("denoiser", full, inputs), expected, atol=1e-5)
    assert live.split(place, 8) == (4, 4) and live.split(place, 6) == (4, 1, 1)
    assert live.memory()["denoiser"] < kept.memory()["denoiser"], "nothing reads the eager weights any more"
    assert torch.allclose(kept.run_eager("denoiser", full, inputs), expected, atol=1e-6)
    with pytest.raises(EngineError, match="moved into its engines"):
        live.run_eager("denoiser", full, inputs)
    with pytest.raises(EngineError, match="no engine of 'denoiser' at size"):
        live.run("denoiser", min(plan.sizes), inputs)


def test_a_record_that_was_altered_is_refused(compiled_denoisers: tuple[Path, Path], tmp_path: Path) -> None:
    """Two constants of one shape exchanged, say: without the digest the pictures alone would tell."""
    _, built = compiled_denoisers
    key = next(path.name for path in built.iterdir() if (path / MANIFEST).is_file())
    shutil.copytree(built / key, tmp_path / key)
    data = json.loads((tmp_path / key / MANIFEST).read_text())
    names = sorted(data["constants"])
    data["constants"] |= {names[0]: data["constants"][names[1]], names[1]: data["constants"][names[0]]}
    (tmp_path / key / MANIFEST).write_text(json.dumps(data))
    (problem,) = EngineStore(tmp_path).verify()
    assert problem.broken and "was altered: it is not what its field 'digest' says" in problem.message
    del data["digest"]
    for version in (data["format"], 3):  # which had no digest
        (tmp_path / key / MANIFEST).write_text(json.dumps({**data, "format": version}))
        assert not EngineStore(tmp_path).has(key)
