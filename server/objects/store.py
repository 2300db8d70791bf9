"""One store of objects, whole or absent: a folder of this machine, or a bucket of S3, Google Cloud or Azure (obstore).

What is written is there once :meth:`Objects.put` returns: a bucket's PUT is atomic, and a folder's file is renamed into
its place after it, and then the folder, were brought to the disk. Readers take pieces, each bound to one version of
the object by its ETag: no reader holds a film in memory, and none is sent halves of two.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from server.core.faults import Fault, RequestError
from server.core.promises import in_a_while
from server.objects.folder import open_folder, write_durably
from server.objects.place import open_bucket

log = logging.getLogger("rmd.server")

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class StoreError(RequestError):
    """The store cannot do now what was asked of it."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            Fault.NOT_READY,
            f"The server's store of films and pictures cannot be used now: {reason}. "
            "Try again after the seconds in Retry-After.",
            code="storage_unavailable",
            retry_after=in_a_while(5),
        )
        self.reason = reason


@dataclass(frozen=True)
class KeptObject:
    """One object as it is now; ``size`` in bytes, ``etag`` with its quotes."""

    name: str
    size: int
    etag: str
    modified: datetime


class Objects:
    """All reads and writes of one store. Used from any thread; what is ``async``, from an event loop.

    Args:
        place: a folder, or a URL as :func:`server.objects.place.open_bucket` takes it.

    Raises:
        ValueError: it is no store, cannot be made or written to, or the environment lacks what it needs.
    """

    def __init__(self, place: Path | str) -> None:
        self.shown = str(place)
        self._folder = place if isinstance(place, Path) else None
        self._store: LocalStore | S3Store | GCSStore | AzureStore
        if isinstance(place, Path):
            try:
                self._store = open_folder(place)
            except OSError as error:
                raise ValueError(f"the store {place} cannot be used: {error.strerror or error} (objects)") from None
        else:
            self._store = open_bucket(place)

    def check(self) -> None:
        """Write, read and remove a small object.

        Raises:
            ValueError: one of them fails. One line: the place, the reason, the setting.
        """
        name = f"check-{secrets.token_hex(8)}"
        try:
            self.put(name, b"rmd")
            with self._told("read"):
                obstore.head(self._store, name)
            self.remove(name)
        except (StoreError, FileNotFoundError) as error:
            reason = error.reason if isinstance(error, StoreError) else "it does not keep what is written to it"
            raise ValueError(f"the store {self.shown} cannot be used: {reason} (objects)") from None

    def put(self, name: str, content: bytes, media_type: str = "application/octet-stream") -> None:
        """Keep an object, in place of what had its name; once this returns, it is not lost.

        Raises:
            StoreError: nothing was kept.
        """
        with self._told("write"):
            if self._folder is not None:
                write_durably(self._folder, name, content)
                return
            kind = {"Content-Type": media_type}
            try:  # in one request: parts of a larger one that is broken off would lie there unseen, and be paid for
                obstore.put(self._store, name, content, attributes=kind, use_multipart=False)
            except FileNotFoundError:
                raise StoreError("there is no such bucket") from None

    async def head(self, name: str) -> KeptObject:
        """Say what an object is now.

        Raises:
            FileNotFoundError: there is none.
            StoreError: the store does not say.
        """
        with self._told("read"):
            return _kept(await obstore.head_async(self._store, name))

    async def read(self, kept: KeptObject, start: int, end: int) -> bytes:
        """Return bytes ``start`` to ``end`` (not included) of an object that has not changed since.

        Raises:
            FileNotFoundError: it is gone, or another one has its name.
            StoreError: the store does not give it.
        """
        with self._told("read"):
            found = await obstore.get_async(
                self._store, kept.name, options={"range": (start, end), "if_match": kept.etag}
            )
            return bytes(await found.bytes_async())

    def remove(self, name: str) -> None:
        """Delete an object; harmless where there is none.

        Raises:
            StoreError: it is still there.
        """
        with self._told("remove"), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, name)

    def under(self, prefix: str) -> list[KeptObject]:
        """Return what has names below ``prefix/``, in the order of their names.

        Raises:
            StoreError: the store does not say.
        """
        with self._told("list"):
            found = [_kept(meta) for meta in obstore.list(self._store, prefix).collect()]
        return sorted(found, key=lambda kept: kept.name)

    def sign(self, name: str, method: str, seconds: float) -> str:
        """Return a URL that gives an object to whoever has it, for so long. Buckets only."""
        assert not isinstance(self._store, LocalStore)
        return obstore.sign(self._store, "HEAD" if method == "HEAD" else "GET", name, timedelta(seconds=seconds))

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turn the store's failures into a StoreError, and log them with the store's own words."""
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        except PreconditionError as error:
            raise FileNotFoundError(str(error)) from None
        except (BaseError, OSError) as error:
            reason = reason_of(error)
            log.error("the store %s failed to %s: %s (%s)", self.shown, what, reason, str(error).partition("\n")[0])
            raise StoreError(reason) from error


def reason_of(error: Exception) -> str:
    """Return what a store's error means, in words that name no host, no path and no key."""
    if isinstance(error, OSError):
        if error.errno in _FULL:
            return "it is full"
        return "it may not be written to" if error.errno in _FORBIDDEN else str(error.strerror or "it failed")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return "it does not let this server do this"
    text = str(error)
    if "169.254." in text:  # where machines of a cloud ask for theirs
        return "the environment holds no credentials for it"
    status = re.search(r"status code: (\d{3})", text)
    if status is not None:
        return "it is full" if status[1] == "507" else f"it answered {status[1]}"
    if "TimedOut" in text:
        return "it does not answer in time"
    return "it cannot be reached" if "error sending request" in text else "it failed"


def _kept(meta: obstore.ObjectMeta) -> KeptObject:
    return KeptObject(meta["path"], meta["size"], str(meta["e_tag"]), meta["last_modified"])
