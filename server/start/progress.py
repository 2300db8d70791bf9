"""The start-up's progress on the terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from server.front.service import READY_TEXT
from server.front.service import Progress as StartUp


class ProgressLine:
    """A progress bar on a terminal, one line a part elsewhere; it ends when the server is ready."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=1)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, progress: StartUp) -> None:
        """Show one report."""
        if not self._console.is_terminal:
            self._console.print(f"[{progress.done}/{progress.total}] {progress.text}", markup=False, highlight=False)
            return
        self._bar.update(self._task, completed=progress.done, total=progress.total, description=progress.text)
        if progress.text == READY_TEXT:  # not at done == total: each part of the start-up counts its own
            self._bar.stop()
