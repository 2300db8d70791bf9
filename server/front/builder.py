"""Engines built beside serving: the server starts on what there is, and changes over as engines are ready."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from engines.build.background import BackgroundBuild
from engines.build.progress import BuildProgress
from server.core.card import ModelCard
from server.start.settings import ServerSettings

log = logging.getLogger("rmd.server")

_NICENESS = 10  # at 19 a server that is never idle would never get its engines


class EngineBuilder:
    """Builds what is missing, one checkpoint after the other, in processes of their own at low priority.

    Args:
        settings: which checkpoints, engines and device.
        on_built: called after each engine that has come into the store.
    """

    def __init__(self, settings: ServerSettings, on_built: Callable[[], None]) -> None:
        self._settings, self._on_built = settings, on_built
        self._lock = threading.Lock()
        self._builds: list[BackgroundBuild] = []
        self._thread: threading.Thread | None = None

    @property
    def progress(self) -> BuildProgress | None:
        """How far the present build is; None where none runs."""
        return next((build.progress for build in self._builds if build.state == "running"), None)

    @property
    def failure(self) -> str | None:
        """Why an engine could not be built; its station goes on as it is."""
        return next((str(build.error) for build in self._builds if build.error is not None), None)

    def look(self, cards: Sequence[ModelCard]) -> None:
        """Start building where a station of a model may want an engine."""
        settings = self._settings
        with self._lock:
            if not settings.build_missing or self._thread is not None:
                return
            folders = {model_id: folder for folder, model_id in settings.models}
            wanted = [card for card in cards if not card.complete]
            if not wanted:
                return
            for card in wanted:
                reporter = _Reporter(card.model_id, self._on_built)
                self._builds.append(self._build(folders[card.model_id], settings.backend, reporter))
            self._thread = threading.Thread(target=self._run, name="rmd-build", daemon=True)
        log.info("building engines beside serving; stations change over as they are ready")
        self._thread.start()

    def stop(self) -> None:
        """End the build; what is complete stays."""
        for build in self._builds:
            build.stop()

    def _build(self, folder: Path, backend: str, report: Callable[[BuildProgress], None]) -> BackgroundBuild:
        settings = self._settings
        return BackgroundBuild(
            folder,
            settings.engines,
            backend,
            settings.engine_devices[0].partition(":")[0],
            settings.dtype,
            settings.buckets,
            settings.threads,
            niceness=_NICENESS,
            report=report,
            decoder=settings.decoder,
        )

    def _run(self) -> None:
        for build in self._builds:
            try:
                build.start()
            except RuntimeError:  # it was stopped first
                return
            build.wait()


class _Reporter:
    """Says when a build has another engine."""

    def __init__(self, model_id: str, on_built: Callable[[], None]) -> None:
        self._model_id, self._on_built, self._done = model_id, on_built, 0

    def __call__(self, progress: BuildProgress) -> None:
        if progress.done > self._done:
            self._done = progress.done
            log.info(
                "%s: %d of %d engines are built (%s)", self._model_id, progress.done, progress.total, progress.current
            )
            self._on_built()
