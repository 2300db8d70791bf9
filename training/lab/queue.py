"""The queue: any number of processes take jobs from one folder, each under its own file lock.

There is no server and no list of what is taken: a job is done when its result is there, and taken while its lock is
held. The lock goes with its process, however that ends, and the next one finds the checkpoints.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from training.lab.grid import Grid, Job
from training.lab.job import BusyError, JobStoppedError, Lab, Stop
from training.runtime.interrupts import stopped_by_signals
from training.runtime.memory import keep_freed_memory

_WAIT_SECONDS = 5.0


@dataclass
class Outcome:
    """What a process has done with the queue."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def work(lab: Lab, jobs: list[Job]) -> Outcome:
    """Take jobs until none is left that this process can do, or until :attr:`Lab.stop` is due.

    A job that fails is said and left for the next call; the others go on.
    """
    outcome = Outcome()
    with stopped_by_signals(lab.stop.ask):
        while not lab.stop.due:
            left = [job for job in jobs if not lab.result_file(job).is_file() and job.name not in outcome.failed]
            waiting = False
            for job in left:
                try:
                    if _take(lab, job):
                        outcome.done.append(job.name)
                        break  # look from the top again: the order is the order of worth
                except BusyError:
                    waiting = True
                except JobStoppedError:
                    break
                except Exception as error:  # whatever it is: hours of other jobs are not to end with one
                    outcome.failed[job.name] = f"{type(error).__name__}: {error}"
                    lab.say(f"{job.name} failed and is left for the next run: {outcome.failed[job.name]}")
            else:
                if not waiting:
                    return outcome
                time.sleep(_WAIT_SECONDS)
    outcome.stopped = True
    return outcome


def _take(lab: Lab, job: Job) -> bool:
    """Run the job unless another process has it; whether it was run."""
    folder = lab.run_folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            if lab.result_file(job).is_file():  # finished since the list was made
                return False
            lab.run(job)
            lab.say(f"{job.name}: {lab.result_file(job)}")
            return True
    except Timeout:
        return False


@dataclass(frozen=True)
class LabFolders:
    """Where a lab lies; see :class:`~training.lab.job.Lab`."""

    grid: Path
    root: Path
    results: Path
    teacher: Path
    data: Path
    device: str = "cpu"

    def open(self, minutes: float | None, say: Callable[[str], None]) -> Lab:
        """The lab, to be worked in for so many minutes."""
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        stop = Stop(deadline)
        return Lab(Grid.read(self.grid), self.root, self.results, self.teacher, self.data, self.device, stop, say)


def run_queue(
    folders: LabFolders, jobs: int, minutes: float | None, threads: int | None, say: Callable[[str], None] = print
) -> bool:
    """Work on the queue with several processes of this machine.

    Args:
        jobs: processes; one works in this process.
        minutes: stop after so long, keeping everything; None: until the queue is empty.
        threads: CPU threads of each; the CPUs shared out by default.

    Returns:
        whether nothing failed and nothing was left because a process ended before its time.
    """
    threads = threads or max(1, torch.get_num_threads() // jobs)
    if jobs == 1:
        return _work_here(folders, minutes, threads, say)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(folders, minutes, threads)) for _ in range(jobs)]
    for worker in workers:
        worker.start()

    def ask_all() -> None:
        for worker in workers:
            worker.terminate()

    with stopped_by_signals(ask_all):
        for worker in workers:
            worker.join()
    ended = [worker.exitcode for worker in workers if worker.exitcode]
    for code in ended:
        name = signal.Signals(-code).name if code < 0 else str(code)
        say(f"a process ended with {name}; nothing is lost: run the command again")
    return not ended


def _work_here(folders: LabFolders, minutes: float | None, threads: int, say: Callable[[str], None]) -> bool:
    torch.set_num_threads(threads)
    keep_freed_memory(folders.device)
    lab = folders.open(minutes, say)
    outcome = work(lab, lab.grid.jobs())
    ending = "stopped; the same command goes on" if outcome.stopped else "nothing left to do here"
    say(f"{len(outcome.done)} done, {len(outcome.failed)} failed; {ending}")
    return not outcome.failed


def _worker(folders: LabFolders, minutes: float | None, threads: int) -> None:
    succeeded = _work_here(folders, minutes, threads, lambda text: print(f"[{os.getpid()}] {text}", flush=True))
    raise SystemExit(0 if succeeded else 1)
