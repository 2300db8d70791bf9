"""Where finished films lie: a folder a job, whole or absent."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path

FILM, THUMBNAIL, SPRITESHEET = "video.mp4", "thumbnail.webp", "spritesheet.jpg"
_ABANDONED_SECONDS = 3600.0


class FilmShelf:
    """The folder of finished films.

    Args:
        folder: made where it does not exist.

    Raises:
        OSError: it cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # films and prompts are nobody else's on the machine
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"the folder of films {folder} cannot be written to; give another as videos")

    def put(self, job_id: str, files: Mapping[str, bytes]) -> None:
        """Keep a job's files. Another worker's film of the same job, which has the same bytes, is replaced.

        Raises:
            OSError: the disk is full or not writable; nothing is left behind.
        """
        scratch = self._folder / f".{job_id}-{secrets.token_hex(4)}"
        try:
            scratch.mkdir()
            for name, content in files.items():
                with (scratch / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            self.remove(job_id)
            os.replace(scratch, self._folder / job_id)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def path(self, job_id: str, name: str) -> Path | None:
        """Return one of a job's files; None where it is not here."""
        file = self._folder / job_id / name
        return file if file.is_file() else None

    def remove(self, job_id: str) -> None:
        """Delete a job's files; harmless where there are none."""
        shutil.rmtree(self._folder / job_id, ignore_errors=True)

    def sweep(self, wanted: Collection[str]) -> None:
        """Delete what no job names and nobody has touched for an hour: left by a worker that was killed."""
        limit = time.time() - _ABANDONED_SECONDS
        for entry in self._folder.iterdir():
            ours = entry.name.lstrip(".").startswith("video_")
            if ours and entry.name not in wanted and entry.stat().st_mtime < limit:
                shutil.rmtree(entry, ignore_errors=True)
