"""Builders end with whoever started them, however that ends; torch-free.

A builder runs in a process group of its own, with everything that it starts (workers, the C++ compiler). A thread in it
watches its parent and ends the whole group when the parent is gone: SIGKILL leaves a parent no time to do so itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

_POLL_SECONDS = 0.5
_guarded = threading.Event()


def start_builder(module: str, extra: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start ``python -m module <this process> *arguments``, whose ``main`` calls :func:`die_with_parent`.

    It gets a process group of its own; started by a builder it stays in that one's, so that one signal ends them all.
    Not a session: Linux weighs the nice values of different sessions apart, and a low priority would mean nothing.

    Args:
        module: with a ``main``.
        extra: environment variables.

    Returns:
        The process; all three streams are pipes of text.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", module, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **extra, "PYTHONPATH": os.pathsep.join(paths)},
        process_group=None if _guarded.is_set() else 0,
    )


def die_with_parent(parent: int) -> None:
    """End this process and its group within a second of the end of process ``parent``, which must have started it by
    :func:`start_builder`."""
    _guarded.set()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def end_builder(process: subprocess.Popen[str], patience: float = 0.0) -> None:
    """End a process of :func:`start_builder`, with all that it started.

    Args:
        process: it may have ended already.
        patience: seconds to let it end by itself; its input must have been closed.
    """
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=patience)
    if process.returncode == 0:
        return
    with suppress(ProcessLookupError, PermissionError):
        if _guarded.is_set():  # it shares our group
            _kill_tree(process.pid)
        else:
            os.killpg(process.pid, signal.SIGKILL)  # its compilers too, and also when it has gone before them
    process.wait()


def _kill_tree(pid: int) -> None:
    import psutil

    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def answers_alone() -> TextIO:
    """Standard output for answers alone: what else is printed, by C libraries too, goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def step_back(niceness: int) -> None:
    """Low priority for the processor (0 to 19) and, where the system has classes of it, the lowest for the disk."""
    import psutil

    os.nice(niceness)
    own = psutil.Process()
    if hasattr(psutil, "IOPRIO_CLASS_IDLE"):
        try:
            own.ionice(psutil.IOPRIO_CLASS_IDLE)
        except (OSError, psutil.Error):
            return  # some containers forbid it


def compile_environment(device: str) -> dict[str, str]:
    """Environment of a process that compiles.

    Threads that wait must not spin: they would take the cores from each other and from a server beside. Inductor's pool
    of compile processes is of no use on a CPU, and its processes leave the group.
    """
    waiting = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    return waiting | ({"TORCHINDUCTOR_COMPILE_THREADS": "1"} if device == "cpu" else {})
