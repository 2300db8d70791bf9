"""Which films leave the store, and when: what is too much, what has expired, what nobody owns."""

from __future__ import annotations

import time
from collections.abc import Collection

from server.films.shelf import FilmShelf
from server.films.store import JobStore


class Tidying:
    """Removes films. Any number of servers may do so at once.

    Args:
        store, shelf: of the jobs and their films.
        models: whose films are bounded.
        max_bytes: of all their films; the oldest leave first.

    Raises (each method):
        DatabaseError, StoreError: the rest is still there.
    """

    def __init__(self, store: JobStore, shelf: FilmShelf, models: Collection[str], max_bytes: int) -> None:
        self._store, self._shelf = store, shelf
        self._models, self._max_bytes = models, max_bytes

    def let_go(self) -> None:
        """Remove what is too much or has expired.

        A film reads as expired first, then it goes, then its row: what fails here another server does, or the next
        minute. Servers that do so at once walk the same list, and let no more go than one of them would.
        """
        now, kept = time.time(), self._store.with_files(self._models)
        total = sum(job.bytes for job in kept)
        for job in kept[:-1]:  # the newest one stays in any case
            if total <= self._max_bytes:
                break
            self._store.drop_files(job.id, now)
            total -= job.bytes
        for job_id in self._store.expired(now):
            self._shelf.remove(job_id)
        self._store.forget_expired(now)

    def remove_unless_kept(self, job_id: str) -> None:
        """Remove the film of a job that was not ours any more: unless another worker's, whose files these are too."""
        if self._store.has_ended_without(job_id):
            self._shelf.remove(job_id)
