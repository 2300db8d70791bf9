"""Pictures kept for ``response_format=url``: in memory, bounded in bytes and in time, named by unguessable tokens."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StoredFile:
    """One picture that can be fetched until ``expires_at`` (monotonic seconds)."""

    content: bytes
    media_type: str
    expires_at: float


class FileStore:
    """A bounded shelf of pictures; the oldest leaves first when it is full."""

    def __init__(self, max_bytes: int, life_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._life = life_seconds
        self._clock = clock
        self._files: OrderedDict[str, StoredFile] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, content: bytes, media_type: str, suffix: str) -> str:
        """Keep one picture and return the name it can be fetched by."""
        name = f"{secrets.token_urlsafe(24)}.{suffix}"
        with self._lock:
            self._files[name] = StoredFile(content, media_type, self._clock() + self._life)
            self._bytes += len(content)
            self._prune()
        return name

    def get(self, name: str) -> StoredFile | None:
        """Return a picture, or None where it expired, was pushed out or never was."""
        with self._lock:
            self._prune()
            return self._files.get(name)

    @property
    def stored_bytes(self) -> int:
        """Bytes held now."""
        with self._lock:
            self._prune()
            return self._bytes

    def _prune(self) -> None:
        now = self._clock()
        while self._files:
            name, oldest = next(iter(self._files.items()))
            # One picture above the whole bound is still served: dropping the newest would break its own reply.
            if oldest.expires_at > now and (self._bytes <= self._max_bytes or len(self._files) == 1):
                return
            del self._files[name]
            self._bytes -= len(oldest.content)
