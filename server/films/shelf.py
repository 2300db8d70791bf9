"""Where finished films lie: three objects a job, below its id."""

from __future__ import annotations

from collections.abc import Mapping

from server.objects.store import Objects

FILM, THUMBNAIL, SPRITESHEET = "video.mp4", "thumbnail.webp", "spritesheet.jpg"
MEDIA_TYPES = {FILM: "video/mp4", THUMBNAIL: "image/webp", SPRITESHEET: "image/jpeg"}


def film_object(job_id: str, name: str) -> str:
    """Return the name of one of a job's files in the store."""
    return f"{job_id}/{name}"


class FilmShelf:
    """The films in a store of objects, by job.

    A job's row says that its files are there, so it is written after them and dropped after them: rows are the list
    of what there is to remove, and nobody has to look for films without one. Removing twice is harmless, so every
    server that shares store and database may tidy up.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def put(self, job_id: str, files: Mapping[str, bytes]) -> None:
        """Keep a job's files. Another worker's film of the same job is replaced, file by file.

        Raises:
            StoreError: not all were kept.
        """
        for name, content in files.items():
            self._objects.put(film_object(job_id, name), content, MEDIA_TYPES[name])

    def remove(self, job_id: str) -> None:
        """Delete a job's files; harmless where there are none.

        Raises:
            StoreError: some are still there.
        """
        for name in MEDIA_TYPES:
            self._objects.remove(film_object(job_id, name))
