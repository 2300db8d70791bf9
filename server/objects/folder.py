"""A folder as a store: files appear whole, and outlast a power cut."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from obstore.store import LocalStore

_SCRATCH = ".scratch"
_ABANDONED_SECONDS = 3600.0


def open_folder(folder: Path) -> LocalStore:
    """Make the folder, for this user alone, and clear it of what killed writers left an hour ago.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # films and prompts are nobody else's on the machine
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError("it may not be written to")
    scratch = folder / _SCRATCH
    scratch.mkdir(exist_ok=True)
    for left in scratch.iterdir():
        if left.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
            left.unlink(missing_ok=True)
    return LocalStore(folder, automatic_cleanup=True)


def write_durably(folder: Path, name: str, content: bytes) -> None:
    """Write a file of a store's folder; after a power cut it is as it was or as it should be, once this returned the
    latter.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
    """
    scratch, place = folder / _SCRATCH / secrets.token_hex(8), folder / name
    scratch.parent.mkdir(parents=True, exist_ok=True)
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            _move(scratch, place)
        except FileNotFoundError:  # whoever removed the last file beside it took its folder away just then
            _move(scratch, place)
    finally:
        scratch.unlink(missing_ok=True)
    for parent in (place.parent, folder):
        _sync(parent)


def _move(scratch: Path, place: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    os.replace(scratch, place)


def _sync(folder: Path) -> None:
    """Bring a folder's names to the disk: its files' own fsync does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
