"""Brings finished films to the store, beside the jobs' thread: a slow store must not cost it a lease.

While the store is away its films wait here, and are tried again. Their jobs stay held, and no more are held than may
be made at once, so work on films stops where all of them wait.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

from server.core.faults import Fault, RequestError
from server.films.shelf import FILM, SPRITESHEET, THUMBNAIL, FilmShelf
from server.front.generation import Failed, FinishedPicture
from server.objects.store import StoreError

log = logging.getLogger("rmd.server")

RETRY_SECONDS = 1.0
_THREADS = 4


class Kept:
    """A film that lies on the shelf now, and the bytes of its files."""

    def __init__(self, film: FinishedPicture, size: int) -> None:
        self.film, self.size = film, size


class FilmWriter:
    """Writes films to a shelf in threads of its own.

    Args:
        shelf: the films' place.
        tell: given a job's id and what became of its film; called from any thread.
    """

    def __init__(self, shelf: FilmShelf, tell: Callable[[str, Kept | Failed], None]) -> None:
        self._shelf = shelf
        self._tell = tell
        self._threads = ThreadPoolExecutor(_THREADS, "rmd-films")
        self._stopping = threading.Event()
        self._films: dict[str, Future[None]] = {}  # the jobs' thread's own

    def keep(self, job_id: str, film: FinishedPicture) -> None:
        """Write a film, as soon as the store takes it."""
        self._films = {other: future for other, future in self._films.items() if not future.done()}
        self._films[job_id] = self._threads.submit(self._write, job_id, film)

    def aside(self, work: Callable[[], None]) -> None:
        """Do other work with the store, such as removing films; what it raises is logged."""
        self._threads.submit(self._do, work)

    def finish(self, timeout: float) -> None:
        """Give every film one more try, for ``timeout`` seconds at most; what the store does not take is let go."""
        self._stopping.set()
        wait_for(self._films.values(), timeout)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _write(self, job_id: str, film: FinishedPicture) -> None:
        files = {THUMBNAIL: film.thumbnail, SPRITESHEET: film.spritesheet, FILM: film.content}
        while True:
            try:
                self._shelf.put(job_id, files)
            except StoreError:  # it is in the log
                if self._stopping.wait(RETRY_SECONDS):
                    return
            except Exception:
                log.exception("the film of %s cannot be written", job_id)
                error = RequestError(Fault.INTERNAL, "The film was made and could not be kept.", code="storage_failed")
                self._tell(job_id, Failed(error))
                return
            else:
                self._tell(job_id, Kept(film, sum(map(len, files.values()))))
                return

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except StoreError:
            pass
        except Exception:
            log.exception("films could not be tidied up")
