"""Pictures kept for ``response_format=url``: in memory, bounded in bytes and in time, named by unguessable tokens."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class StoredFile:
    """One picture that can be fetched until ``expires_at`` (monotonic seconds)."""

    content: bytes
    media_type: str
    expires_at: float

    @cached_property
    def etag(self) -> str:
        """Of the content, as HTTP has it."""
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'


class FileStore:
    """A bounded shelf of pictures; the oldest leaves first when it is full."""

    def __init__(self, max_bytes: int, life_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._life = life_seconds
        self._clock = clock
        self._files: OrderedDict[str, StoredFile] = OrderedDict()
        self._bytes = 0
        self._together = 0  # pictures of the newest reply
        self._lock = threading.Lock()

    def put(self, contents: Sequence[bytes], media_type: str, suffix: str) -> list[str]:
        """Keep the pictures of one reply and return the names they can be fetched by."""
        names = [f"{secrets.token_urlsafe(24)}.{suffix}" for _ in contents]
        with self._lock:
            for name, content in zip(names, contents, strict=True):
                self._files[name] = StoredFile(content, media_type, self._clock() + self._life)
                self._bytes += len(content)
            self._together = len(names)
            self._prune()
        return names

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
            # The newest reply is served whole though it is above the bound: its own links would be dead on arrival.
            if oldest.expires_at > now and (self._bytes <= self._max_bytes or len(self._files) <= self._together):
                return
            del self._files[name]
            self._bytes -= len(oldest.content)
