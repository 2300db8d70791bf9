"""Builds engines in processes of their own: compiling is single-threaded, so two cores build twice as fast.

A worker is ``python -m engines.worker``: its first line of input says for which checkpoint and store, each further line
names an engine; it answers each with one line.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines import errors
from engines.errors import EngineError

if TYPE_CHECKING:
    from engines.planning import CheckpointPlan, PlannedEngine
    from engines.store import EngineStore

_MARK = "@engine "


def build_in_processes(
    plan: CheckpointPlan, store: EngineStore, missing: list[PlannedEngine], workers: int
) -> Iterator[str]:
    """Builds ``missing`` in ``workers`` processes; yields each engine's title as it is done.

    Raises:
        EngineError: the first failure of a worker, of its own kind; the other workers are stopped, and what they were
            building is dropped.
    """
    import torch

    job = json.dumps(
        {
            "checkpoint": str(plan.checkpoint.path.resolve()),
            "store": str(store.root.resolve()),
            "options": asdict(plan.options),
            "threads": torch.get_num_threads(),
        }
    )
    todo: queue.SimpleQueue[PlannedEngine] = queue.SimpleQueue()
    # Large batches take longest to measure, so they start first and no worker ends alone with one.
    for engine in sorted(missing, key=lambda engine: -engine.spec.batch):
        todo.put(engine)
    done: queue.SimpleQueue[str | BaseException] = queue.SimpleQueue()
    processes = [_start() for _ in range(workers)]
    threads = [threading.Thread(target=_feed, args=(process, job, todo, done), daemon=True) for process in processes]
    for thread in threads:
        thread.start()
    try:
        for _ in missing:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()  # the end of its input ends a worker
        for process in processes:
            try:
                process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()


def _start() -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [sys.executable, "-m", "engines.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _feed(
    process: subprocess.Popen[str],
    job: str,
    todo: queue.SimpleQueue[PlannedEngine],
    done: queue.SimpleQueue[str | BaseException],
) -> None:
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    said: list[str] = []
    threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True).start()
    try:
        print(job, file=process.stdin, flush=True)
        while True:
            try:
                engine = todo.get_nowait()
            except queue.Empty:
                return
            size = None if engine.size is None else str(engine.size)
            place = [engine.component, size, engine.spec.batches, engine.spec.key]
            print(json.dumps(place), file=process.stdin, flush=True)
            answer = next((line for line in process.stdout if line.startswith(_MARK)), None)
            if answer is None:
                last = "".join(said).strip().splitlines()
                raise EngineError(
                    f"the process that built {engine.spec.title} died: {last[-1] if last else 'no message'}"
                )
            failure = json.loads(answer.removeprefix(_MARK))
            if failure is not None:
                kind = getattr(errors, failure["kind"], EngineError)
                raise kind(failure["message"])
            done.put(engine.spec.title)
    except (EngineError, OSError, ValueError) as error:
        done.put(error)


def main() -> None:
    """Serve one parent until it closes our input."""
    from engines.build import build_engine
    from engines.planning import CheckpointPlan, EngineOptions, load_backbone
    from engines.store import EngineStore
    from rmd.checkpoint import CheckpointFolder
    from rmd.size import Size

    # Libraries print what they like; the answers keep standard output to themselves.
    answers, sys.stdout = sys.stdout, sys.stderr
    first = sys.stdin.readline()
    if not first:
        return
    job: dict[str, Any] = json.loads(first)
    import torch

    torch.set_num_threads(job["threads"])
    options = EngineOptions(**{**job["options"], "buckets": tuple(job["options"]["buckets"])})
    checkpoint = CheckpointFolder.read(job["checkpoint"])
    backbone = load_backbone(checkpoint, options)
    plan = CheckpointPlan(checkpoint, options, backbone)
    store = EngineStore(job["store"])
    for line in sys.stdin:
        component, size_text, batches, key = json.loads(line)
        failure: dict[str, str] | None = None
        try:
            size = None if size_text is None else Size.parse(size_text)
            spec = plan.spec(component, size, *batches)
            if spec.key != key:
                raise EngineError(f"the worker plans {spec.title} as {spec.key}, its parent as {key}")
            build_engine(
                plan.compiler, store, plan.modules[component], spec, plan.typical_inputs(component, size, max(batches))
            )
        except Exception as error:
            failure = {"kind": type(error).__name__, "message": str(error) or type(error).__name__}
        print(f"{_MARK}{json.dumps(failure)}", file=answers, flush=True)


if __name__ == "__main__":
    main()
