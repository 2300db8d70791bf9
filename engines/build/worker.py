"""Builds engines in processes of their own: compiling is single-threaded, so two cores build twice as fast.

A worker is ``python -m engines.build.worker``: its first line of input says for which checkpoint and store, each
further line names an engine; it answers each with one line. It ends when its parent does.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Generator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from engines import errors
from engines.build.orphans import answers_alone, compile_environment, die_with_parent, end_builder, start_builder
from engines.errors import EngineError, NotEnoughDisk

if TYPE_CHECKING:
    from engines.plan.checkpoint import CheckpointPlan, PlannedEngine
    from engines.store import EngineStore

_MARK = "@engine "


def build_in_processes(
    plan: CheckpointPlan, store: EngineStore, missing: list[PlannedEngine], workers: int
) -> Generator[tuple[PlannedEngine, EngineError | None], None, None]:
    """Builds ``missing``, in this order, in ``workers`` processes; yields each engine as it is done, or why it failed.

    Where it is closed early, the workers are stopped, and what they were building is dropped.

    Raises:
        NotEnoughDisk: no other engine would fit either.
        EngineError: a worker died, or could not be started.
    """
    import torch

    job = json.dumps(
        {
            "checkpoint": str(plan.checkpoint.path.resolve()),
            "decoder": plan.checkpoint.chosen_decoder,
            "store": str(store.root.resolve()),
            "options": asdict(plan.options),
            "threads": torch.get_num_threads(),
        }
    )
    todo: queue.SimpleQueue[PlannedEngine] = queue.SimpleQueue()
    for engine in missing:
        todo.put(engine)
    done: queue.SimpleQueue[tuple[PlannedEngine, EngineError | None] | BaseException] = queue.SimpleQueue()
    environment = compile_environment(plan.target.device)
    processes = [start_builder("engines.build.worker", environment) for _ in range(workers)]
    threads = [threading.Thread(target=_feed, args=(process, job, todo, done), daemon=True) for process in processes]
    for thread in threads:
        thread.start()
    try:
        for _ in missing:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            if isinstance(result[1], NotEnoughDisk):
                raise result[1]
            yield result
    finally:
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()  # the end of its input ends a worker
        for process in processes:
            end_builder(process, patience=0.5)


def _feed(
    process: subprocess.Popen[str],
    job: str,
    todo: queue.SimpleQueue[PlannedEngine],
    done: queue.SimpleQueue[tuple[PlannedEngine, EngineError | None] | BaseException],
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
            done.put((engine, None if failure is None else errors.of_kind(failure["kind"], failure["message"])))
    except (EngineError, OSError, ValueError) as error:
        done.put(error)


def main() -> None:
    """Serve one parent until it closes our input."""
    die_with_parent(int(sys.argv[1]))
    answers = answers_alone()
    from engines.build.one import build_engine
    from engines.plan.checkpoint import CheckpointPlan, load_backbone
    from engines.plan.options import EngineOptions
    from engines.store import EngineStore
    from rmd.checkpoint import CheckpointFolder
    from rmd.size import Size

    first = sys.stdin.readline()
    if not first:
        return
    job: dict[str, Any] = json.loads(first)
    import torch

    torch.set_num_threads(job["threads"])
    options = EngineOptions(**{**job["options"], "buckets": tuple(job["options"]["buckets"])})
    checkpoint = CheckpointFolder.read(job["checkpoint"]).with_decoder(job["decoder"])
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
