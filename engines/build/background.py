"""Builds engines beside a running server, in a process of its own at the lowest priority; torch-free to import.

``python -m engines.build.background`` is that process: its one line of input says what to build, each line of output
tells how far it is. It ends, with everything that it started, when its parent does.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from engines.build.orphans import (
    answers_alone,
    compile_environment,
    die_with_parent,
    end_builder,
    start_builder,
    step_back,
)
from engines.build.progress import BuildProgress, Report
from engines.errors import EngineError, of_kind

log = logging.getLogger(__name__)

State = Literal["new", "running", "done", "failed", "stopped"]
_MARK = "@build "


class BackgroundBuild:
    """Builds the engines that a checkpoint's store lacks, those first that a server gains most from.

    They are compared with eager, and not timed: their user learns what they cost. One that fails does not stop the
    others.

    Args:
        checkpoint: folder.
        store: folder of built engines.
        backend: a resolved backend's name, or "auto".
        device, dtype, buckets: see :class:`~engines.plan.options.EngineOptions`.
        threads: on which CPU engines will run; it is part of their key. None: torch's default.
        niceness: 0 to 19; at 19 it gets next to nothing while the processors are busy with anything else.
        report: told of every step, on a thread of its own.
        announce: given the memory plan as text, on the same thread.
        decoder: see :func:`~engines.build.checkpoint.build_checkpoint`.

    Attributes:
        progress: the last step, None before the first.
    """

    def __init__(
        self,
        checkpoint: Path | str,
        store: Path | str,
        backend: str = "auto",
        device: str = "cpu",
        dtype: str = "auto",
        buckets: Sequence[int] | None = None,
        threads: int | None = None,
        niceness: int = 19,
        report: Report | None = None,
        announce: Callable[[str], None] | None = None,
        decoder: str | None = None,
    ) -> None:
        self._job = {
            "checkpoint": str(Path(checkpoint).resolve()),
            "store": str(Path(store).resolve()),
            "backend": backend,
            "device": device,
            "dtype": dtype,
            "buckets": None if buckets is None else list(buckets),
            "threads": threads,
            "niceness": niceness,
            "decoder": decoder,
        }
        self._device = device.partition(":")[0]
        self._report = report or (lambda _: None)
        self._announce = announce or (lambda text: log.info("%s", text))
        self._lock = threading.Lock()
        self._state: State = "new"
        self._error: EngineError | None = None
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self.progress: BuildProgress | None = None

    @property
    def state(self) -> State:
        """ "new", "running", "done", "failed" (see :attr:`error`) or "stopped"."""
        return self._state

    @property
    def error(self) -> EngineError | None:
        """The first failure. Engines that were complete, before or after it, are in the store."""
        return self._error

    def start(self) -> None:
        """Start the process; returns at once.

        Raises:
            RuntimeError: it was started before.
        """
        with self._lock:
            if self._state != "new":
                raise RuntimeError("this build was started before; make another")
            self._state = "running"
            self._process = start_builder("engines.build.background", compile_environment(self._device))
        self._reader = threading.Thread(target=self._read, args=(self._process,), name="engine-build", daemon=True)
        self._reader.start()

    def stop(self) -> None:
        """End the process and all that it started, within two seconds; what was complete stays. May be repeated."""
        with self._lock:
            process, running = self._process, self._state == "running"
            if self._state in ("new", "running"):
                self._state = "stopped"
        if process is not None and running:
            end_builder(process)
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(timeout=1.0)

    def wait(self, timeout: float | None = None) -> State:
        """Wait for the end of the build, at most ``timeout`` seconds, and return the state."""
        if self._reader is not None:
            self._reader.join(timeout)
        return self._state

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        said: deque[str] = deque(maxlen=20)
        errors = process.stderr
        listener = threading.Thread(target=lambda: said.extend(errors), daemon=True)
        listener.start()
        finished = False
        try:
            print(json.dumps(self._job), file=process.stdin, flush=True)
            for line in process.stdout:
                if line.startswith(_MARK):
                    finished |= self._told(json.loads(line.removeprefix(_MARK)))
        except (OSError, ValueError) as error:
            said.append(str(error))
        if not finished:
            listener.join(timeout=1.0)
            last = next((line.strip() for line in reversed(said) if line.strip()), "no message")
            self._fail(EngineError(f"the process that builds engines died: {last}"))
        end_builder(process, patience=5.0)
        with self._lock:
            if self._state == "running":
                self._state = "failed" if self._error else "done"

    def _told(self, message: dict[str, Any]) -> bool:
        """Takes one message; whether it is the last."""
        if "progress" in message:
            self.progress = BuildProgress(**message["progress"])
            self._call(self._report, self.progress)
        elif "announce" in message:
            self._call(self._announce, message["announce"])
        elif "failure" in message:
            self._fail(of_kind(message["failure"]["kind"], message["failure"]["message"]))
        return "finished" in message

    def _call(self, told: Callable[[Any], None], what: object) -> None:
        try:
            told(what)
        except Exception:
            log.exception("a listener of the engine build failed")

    def _fail(self, error: EngineError) -> None:
        with self._lock:
            if self._state == "running" and self._error is None:
                self._error = error


def main() -> None:
    """Build what the one line of input asks for."""
    die_with_parent(int(sys.argv[1]))
    answers = answers_alone()
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    step_back(job["niceness"])
    lock = threading.Lock()

    def tell(**message: object) -> None:
        with lock:
            print(f"{_MARK}{json.dumps(message)}", file=answers, flush=True)

    def failure(error: BaseException) -> dict[str, str]:
        return {"kind": type(error).__name__, "message": str(error) or type(error).__name__}

    try:
        import torch

        from engines.build.checkpoint import build_checkpoint

        if job["threads"] is not None:
            torch.set_num_threads(job["threads"])
        built = build_checkpoint(
            job["checkpoint"],
            job["store"],
            job["backend"],
            lambda progress: tell(progress=asdict(progress)),
            device=job["device"],
            dtype=job["dtype"],
            buckets=job["buckets"],
            announce=lambda text: tell(announce=text),
            while_serving=True,
            decoder=job["decoder"],
        )
        for each in built.failed:
            tell(failure=failure(each.error))
    except Exception as error:
        tell(failure=failure(error))
    tell(finished=True)


if __name__ == "__main__":
    main()
