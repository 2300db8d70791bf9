"""Two batches at a time on a CPU, each on a *track*: half of the threads.

While one batch has the whole device, every step ends when the last core is done, and where a machine is shared, one
core or the other always is late: the rest stand still meanwhile. On tracks each half goes on with the next batch as
soon as it is done with one. A picture alone would take twice as long there, so tracks are for long queues.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from engines.tracks import Track, enter_track
from server.core.loop import Batch
from server.core.stations import StationKey
from server.core.tickets import Ticket
from server.device.steps import Done

Run = Callable[[StationKey, Sequence[Ticket]], Done]


@dataclass(frozen=True)
class Outcome:
    """What became of a batch.

    Attributes:
        done: what it gave, or what it raised.
        seconds: that it took.
    """

    batch: Batch
    done: Done | Exception
    seconds: float
    track: int


class Tracks:
    """Threads that run batches side by side; started and awaited by the engine's own thread.

    Args:
        count: of tracks.
        threads: torch's, of all of them together.
    """

    def __init__(self, count: int, threads: int) -> None:
        self.count = count
        self._free = list(range(count))
        self._over: SimpleQueue[Outcome] = SimpleQueue()
        before = torch.get_num_threads()
        self._threads = [
            ThreadPoolExecutor(1, f"track-{index}", enter_track, (Track(index, count), max(threads // count, 1)))
            for index in range(count)
        ]
        for thread in self._threads:
            thread.submit(torch.get_num_threads).result()
        torch.set_num_threads(before)  # for all threads that begin from now on

    @property
    def free(self) -> bool:
        """Whether a batch can be started."""
        return bool(self._free)

    @property
    def idle(self) -> bool:
        """Whether no batch runs."""
        return len(self._free) == self.count

    def start(self, batch: Batch, run: Run) -> None:
        """Run a batch on a free track."""
        index = self._free.pop()
        self._threads[index].submit(self._run, index, batch, run)

    def wait(self) -> Outcome:
        """Return what became of the batch that is over first."""
        outcome = self._over.get()
        self._free.append(outcome.track)
        return outcome

    def _run(self, index: int, batch: Batch, run: Run) -> None:
        started = time.perf_counter()
        done: Done | Exception
        try:
            done = run(batch.key, batch.tickets)
        except Exception as error:
            done = error
        self._over.put(Outcome(batch, done, time.perf_counter() - started, index))
