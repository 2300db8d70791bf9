"""A thread that asks the roster again and again; a replica's own event loop is Ray's."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from deploy.ray.roster import ASK_SECONDS

log = logging.getLogger("rmd.server")


class Asking:
    """Calls ``ask`` every second until told to stop. Where it raises, what was known stays true.

    Args:
        ask: called in a thread; may block.
    """

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rmd-asking", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._ask()
            except Exception as error:  # whatever Ray raises: the roster is started again, or moves
                log.warning("the roster does not answer: %s: %s", type(error).__name__, error)
            self._stopped.wait(ASK_SECONDS)
