"""Processes that stand still for a while, as on a machine that is paused."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator


@contextlib.contextmanager
def standing_still(pids: Iterable[int]) -> Iterator[None]:
    """Stop processes until the block ends, or for as long as they live."""
    stopped = list(pids)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
