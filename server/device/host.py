"""An engine in a thread of this process, behind an open door: what a cluster's replica runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from server.device.open_door import OpenDoor
from server.device.process import make_engine
from server.device.settings import Contact, EngineSettings

log = logging.getLogger("rmd.server")


class EngineHost:
    """Starts the engine. Whoever made it watches it by :meth:`check`, and ends the process where that raises.

    Args:
        settings: the engine's; its ``address`` and ``parent`` mean nothing here.
        host: the address of this machine that fronts reach.
        watchdog_seconds, watchdog_factor: it hangs where a batch takes longer than both (the second: times what it
            should take).
    """

    def __init__(self, settings: EngineSettings, host: str, watchdog_seconds: float, watchdog_factor: float) -> None:
        self._door = OpenDoor(host)
        self._least, self._factor = watchdog_seconds, watchdog_factor
        self._engine = make_engine(settings, self._door)
        self._thread = threading.Thread(target=self._run, name="rmd-engine", daemon=True)
        self._thread.start()

    @property
    def contact(self) -> Contact:
        """Where fronts meet it."""
        return self._door.contact

    def admit(self, keys: Iterable[bytes]) -> None:
        """Let fronts in whose public key (Z85) is among these, from now on no others."""
        self._door.admit(keys)

    def wait_ready(self) -> None:
        """Block until its models are loaded.

        Raises:
            RuntimeError: they cannot be.
        """
        while not self._door.ready.wait(0.1):
            self.check()

    def check(self) -> None:
        """Raise where it has ended or hangs.

        Raises:
            RuntimeError: see above.
        """
        if not self._thread.is_alive():
            raise RuntimeError(self._door.unable.reason if self._door.unable else "the engine has ended")
        hung = self._door.running.hung(self._least, self._factor)
        if hung:
            raise RuntimeError(f"the engine hangs: {hung}")

    def leave(self, timeout: float) -> bool:
        """Have it make what it was given, then end; False where ``timeout`` seconds did not suffice."""
        self._door.leave()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._engine.run()
        except Exception:
            log.exception("the engine's thread broke")
        finally:
            self._door.close()
