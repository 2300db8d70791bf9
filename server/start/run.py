"""uvicorn with a drain before its shutdown."""

from __future__ import annotations

import logging
import socket
import threading
from functools import partial
from types import FrameType

import uvicorn

from server.front.service import Service
from server.http.app import create_app
from server.http.connections import BoundedProtocol, Doorway, bounds, raise_descriptor_limit
from server.http.incoming import CLIENT_PATIENCE_SECONDS

log = logging.getLogger("rmd.server")

_KEEP_ALIVE_SECONDS = 75
LAST_REPLIES_SECONDS = 10


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or Ctrl-C: refuse new requests (503), finish the accepted ones, then stop.

    uvicorn alone would close its listening socket at once, so that a load balancer sees refused connections where
    it should see 503 and a failing readiness probe. A second signal gives up what is not finished (503).
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._listening = _listen(config.host, config.port)
        self._draining = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on the socket that was opened at construction, or on the given ones, until stopped."""
        super().run(sockets or [self._listening])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal; called on the main thread."""
        if self._draining:
            threading.Thread(target=self._service.stop, name="rmd-stop", daemon=True).start()
            super().handle_exit(sig, frame)
            return
        self._draining = True
        threading.Thread(target=self.drain, name="rmd-drain", daemon=True).start()

    def drain(self) -> None:
        """Finish what was accepted, at most ``drain_seconds`` long, then let uvicorn stop."""
        self._service.drain()
        log.info("draining: %d request(s) to finish", self._service.admission.requests)
        if not self._service.wait_idle(self._service.settings.drain_seconds):
            log.warning("drain_seconds passed: %d request(s) are given up", self._service.admission.requests)
            self._service.stop()
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    """Open the port before anything is loaded for it, and let the kernel give up on clients that take nothing.

    Raises:
        ValueError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host} port {port} ({error.strerror or error}); choose another --port or --host"
        ) from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * CLIENT_PATIENCE_SECONDS))
    return listening


def make_server(service: Service) -> DrainingServer:
    """Return a server for ``service.settings.host`` and ``port``, which it listens on already.

    Raises:
        ValueError: it cannot.
    """
    settings = service.settings
    most, backlog = bounds(raise_descriptor_limit())
    config = uvicorn.Config(
        create_app(service),
        host=settings.host,
        port=settings.port,
        # h11: bounds request line and headers at 64 KiB; httptools keeps whatever is sent
        http=partial(BoundedProtocol, doorway=Doorway(most)),  # type: ignore[arg-type]
        ws="none",
        backlog=backlog,
        access_log=False,  # ours names keys, and leaves out queries
        log_level=settings.log_level,
        log_config=None,  # its lines go where all go, in their format
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_REPLIES_SECONDS,
        server_header=False,
    )
    return DrainingServer(config, service)
