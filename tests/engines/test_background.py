"""Building beside a server: real processes, really killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from engines.build.background import BackgroundBuild
from engines.build.checkpoint import build_checkpoint
from engines.build.progress import BuildProgress
from engines.errors import BackendUnavailable, EngineError, of_kind
from engines.manifest import Manifest
from engines.plan.checkpoint import missing_engines, plan_checkpoint
from engines.store import EngineStore

_MARK = "RMD_TEST_MARK"


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[psutil.Process]]]:
    """Every process that this test started and all that those started, found by a variable that they inherit."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(_MARK, mark)

    def processes() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get(_MARK) == mark:
                    found += [] if process.status() == psutil.STATUS_ZOMBIE else [process]
            except psutil.Error:
                continue
        return found

    yield processes
    for process in processes():
        process.kill()


def within(seconds: float, condition: Callable[[], object]) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def compiling(processes: list[psutil.Process]) -> bool:
    for process in processes:
        try:
            if re.search(r"cc1plus|g\+\+", process.name()):
                return True
        except psutil.Error:
            continue
    return False


def test_importing_it_needs_no_torch() -> None:
    script = "import sys, engines.build.background; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_it_builds_what_is_missing_and_times_nothing(
    tiny_checkpoint: Path, tmp_path: Path, marked: Callable[[], list[psutil.Process]]
) -> None:
    seen: list[BuildProgress] = []
    build = BackgroundBuild(
        tiny_checkpoint, tmp_path, "eager", dtype="float32", buckets=(1,), threads=1, niceness=3, report=seen.append
    )
    assert build.state == "new"
    build.start()
    assert within(60, marked)
    assert within(20, lambda: any(process.nice() >= os.nice(0) + 3 for process in marked()))
    assert build.wait(120) == "done" and build.error is None, build.error
    plan = plan_checkpoint(tiny_checkpoint, "eager", dtype="float32", buckets=(1,))
    assert missing_engines(plan, EngineStore(tmp_path)) == []
    assert [progress.done for progress in seen] == list(range(len(plan.engines) + 1)) and build.progress == seen[-1]
    assert not any(manifest.latency_seconds for manifest in EngineStore(tmp_path).list())
    assert within(5, lambda: not marked())
    build.stop()
    assert build.state == "done"
    with pytest.raises(RuntimeError, match="started before"):
        build.start()
    # `rmd build` times what a server left untimed.
    build_checkpoint(tiny_checkpoint, tmp_path, "eager", dtype="float32", buckets=(1,))
    assert all(manifest.latency_seconds for manifest in EngineStore(tmp_path).list())


def test_what_cannot_be_built_is_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    build = BackgroundBuild(tiny_checkpoint, tmp_path, "onnx", niceness=0)
    build.start()
    assert build.wait(60) == "failed"
    assert isinstance(build.error, BackendUnavailable) and "unknown backend 'onnx'" in str(build.error)
    assert type(of_kind("KeyError", "x")) is EngineError


def test_a_killed_server_leaves_no_builder_and_a_store_that_goes_on(
    tiny_checkpoint: Path, tmp_path: Path, marked: Callable[[], list[psutil.Process]]
) -> None:
    script = textwrap.dedent("""
        import sys, time
        from engines.build.background import BackgroundBuild
        BackgroundBuild(
            sys.argv[1], sys.argv[2], "inductor", dtype="float32", buckets=(1,), threads=1, niceness=0
        ).start()
        time.sleep(600)
    """)
    server = subprocess.Popen([sys.executable, "-c", script, str(tiny_checkpoint), str(tmp_path)])
    assert within(200, lambda: compiling(marked())), "no compiler was started"
    assert len(marked()) >= 3
    server.send_signal(signal.SIGKILL)
    server.wait()
    assert within(5, lambda: not marked()), marked()

    store = EngineStore(tmp_path)
    torch.set_num_threads(1)
    plan = plan_checkpoint(tiny_checkpoint, "inductor", dtype="float32", buckets=(1,))
    left = [path.name.removeprefix(".building-") for path in tmp_path.glob(".building-*")]
    missing = {engine.spec.key: engine.spec for engine in missing_engines(plan, store)}
    assert left and set(left) <= set(missing), "nothing half-written under an engine's own name"
    for key in left:  # no lock of the dead is in the way, and what they left is not in it
        spec = missing[key]
        built = store.build(key, lambda _, s=spec: Manifest(s, {}, s.inputs, s.inputs[0], s.weights_mode))
        assert built.files == {}
    assert not list(tmp_path.glob(".building-*")) and store.verify() == []


def test_it_is_stopped_in_the_middle_of_a_compilation(
    tiny_checkpoint: Path, tmp_path: Path, marked: Callable[[], list[psutil.Process]]
) -> None:
    build = BackgroundBuild(tiny_checkpoint, tmp_path, "inductor", dtype="float32", buckets=(1,), threads=1, niceness=0)
    build.start()
    assert within(200, lambda: compiling(marked())) and build.state == "running", build.error
    started = time.monotonic()
    build.stop()
    assert time.monotonic() - started < 2
    assert within(0.5, lambda: not marked()), marked()
    assert build.state == "stopped" and build.error is None


def test_workers_of_a_killed_build_end_too(
    tiny_checkpoint: Path, tmp_path: Path, marked: Callable[[], list[psutil.Process]]
) -> None:
    script = textwrap.dedent("""
        import sys
        from engines.build.checkpoint import build_checkpoint
        build_checkpoint(sys.argv[1], sys.argv[2], "inductor", dtype="float32", buckets=(1, 2), workers=2)
    """)
    parent = subprocess.Popen([sys.executable, "-c", script, str(tiny_checkpoint), str(tmp_path / "store")])
    assert within(120, lambda: compiling(marked())), "no compiler was started"
    parent.kill()
    parent.wait()
    assert within(5, lambda: not marked()), marked()


def test_a_file_in_an_engines_place_costs_no_build(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_checkpoint(tiny_checkpoint, "inductor", dtype="float32", buckets=(1,))
    (tmp_path / plan.engines[-1].spec.key).write_text("not an engine")
    started = time.monotonic()
    with pytest.raises(EngineError, match="is no folder, and an engine's is to go there; remove it"):
        build_checkpoint(tiny_checkpoint, tmp_path, "inductor", dtype="float32", buckets=(1,))
    assert time.monotonic() - started < 10
    assert EngineStore(tmp_path).keys() == []
