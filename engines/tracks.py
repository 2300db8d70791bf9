"""Several batches at a time on one CPU: *tracks*, each with its equal part of the threads.

A thread that runs on a track says so once (:func:`enter_track`), and engines compiled in streams
(``engines/compilers/inductor/streams.py``) give it the code of its own streams alone.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Track:
    """One of ``count`` tracks."""

    index: int
    count: int


class _Here(threading.local):
    track: Track | None = None


_here = _Here()


def enter_track(track: Track, threads: int) -> None:
    """Have the calling thread run on a track from now on, with so many threads of torch's."""
    _here.track = track
    torch.get_num_threads()  # which sets a new thread's number to the process's, once
    torch.set_num_threads(threads)


def current_track() -> Track | None:
    """Return the calling thread's track; None where it has the whole device."""
    return _here.track
