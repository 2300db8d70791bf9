"""Engines built beside serving: the server starts on what there is, and changes over as engines are ready."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from engines.background import BackgroundBuild
from engines.progress import BuildProgress
from server.core.card import ModelCard
from server.start.settings import ServerSettings

log = logging.getLogger("rmd.server")

_EAGER = "eager"
_NICENESS = 10  # at 19 a server that is never idle would never get its engines


class EngineBuilder:
    """Builds what is missing, once, in a process of its own at low priority.

    Args:
        settings: which checkpoint, engines and device.
        on_built: called after each engine that has come into the store.
    """

    def __init__(self, settings: ServerSettings, on_built: Callable[[], None]) -> None:
        self._settings, self._on_built = settings, on_built
        self._lock = threading.Lock()
        self._build: BackgroundBuild | None = None
        self._done = 0

    @property
    def progress(self) -> BuildProgress | None:
        """How far the build is; None where none runs."""
        build = self._build
        return build.progress if build is not None and build.state == "running" else None

    @property
    def failure(self) -> str | None:
        """Why an engine could not be built; its station goes on as it is."""
        return str(self._build.error) if self._build is not None and self._build.error is not None else None

    def look(self, card: ModelCard) -> None:
        """Start building where a station of the model may want an engine."""
        settings = self._settings
        with self._lock:
            if not settings.build_missing or card.executor_kind == _EAGER or self._build is not None or card.complete:
                return
            self._build = BackgroundBuild(
                settings.checkpoint,
                settings.engines,
                card.executor_kind,
                settings.engine_devices[0].partition(":")[0],
                settings.dtype,
                settings.buckets,
                settings.threads,
                niceness=_NICENESS,
                report=self._report,
            )
        log.info("building engines beside serving; stations change over as they are ready")
        self._build.start()

    def stop(self) -> None:
        """End the build; what is complete stays."""
        if self._build is not None:
            self._build.stop()

    def _report(self, progress: BuildProgress) -> None:
        if progress.done > self._done:
            self._done = progress.done
            log.info("%d of %d engines are built (%s)", progress.done, progress.total, progress.current)
            self._on_built()
