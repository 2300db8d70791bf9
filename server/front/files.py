"""Pictures kept for ``response_format=url``: bounded in bytes and in time, named by unguessable tokens.

They lie in the store of objects, so that whichever server made one, any answers for it. A name begins with the time at
which the picture expires: no server has to ask another whether it has, names sort as they expire, and so all servers
remove the same ones, in the same order.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from server.objects.store import KeptObject, Objects, StoreError

log = logging.getLogger("rmd.server")

_FOLDER = "pictures"
_NAME = re.compile(r"([0-9a-f]{12})-[\w-]{32}\.(png|jpeg|webp)", re.ASCII)
_TIDY_SECONDS = 60.0
_TOGETHER = 8


class LinkedPictures:
    """The pictures in a store of objects.

    Args:
        objects: the store.
        max_bytes: of all pictures; the first to expire leave first. What other servers kept since the last look at
            the store (a minute at most) is not counted yet.
        life_seconds: how long a picture can be fetched.
        clock: seconds since 1970.
    """

    def __init__(
        self, objects: Objects, max_bytes: int, life_seconds: float, clock: Callable[[], float] = time.time
    ) -> None:
        self.objects = objects
        self._max_bytes = max_bytes
        self._life = life_seconds
        self._clock = clock
        self._bytes = 0
        self._lock = threading.Lock()
        self._writers = ThreadPoolExecutor(_TOGETHER, "rmd-pictures")
        self._due, self._stopping = threading.Event(), threading.Event()
        self._tidying = threading.Thread(target=self._main, name="rmd-tidy", daemon=True)

    @property
    def stored_bytes(self) -> int:
        """Bytes held, as far as this server knows."""
        return self._bytes

    def start(self) -> None:
        """Begin to remove what expires or is too much."""
        self._due.set()
        self._tidying.start()

    def stop(self) -> None:
        """End the thread that tidies up."""
        self._stopping.set()
        self._due.set()

    async def put(self, contents: Sequence[bytes], media_type: str, suffix: str) -> list[str]:
        """Keep the pictures of one reply and return the names they can be fetched by.

        Raises:
            StoreError: they cannot all be kept.
        """
        stamp = int(1000 * (self._clock() + self._life))
        names = [f"{stamp:012x}-{secrets.token_urlsafe(24)}.{suffix}" for _ in contents]
        loop = asyncio.get_running_loop()
        puts = (
            loop.run_in_executor(self._writers, self.objects.put, _object(name), content, media_type)
            for name, content in zip(names, contents, strict=True)
        )
        await asyncio.gather(*puts)
        with self._lock:
            self._bytes += sum(map(len, contents))
        if self._bytes > self._max_bytes:
            self._due.set()
        return names

    async def find(self, name: str) -> tuple[KeptObject, float] | None:
        """Return a picture and the seconds it is still there; None where it expired, was pushed out or never was.

        Raises:
            StoreError: the store does not say.
        """
        left = self._seconds_left(name)
        if left <= 0:
            return None
        try:
            return await self.objects.head(_object(name)), left
        except FileNotFoundError:
            return None

    def tidy(self) -> None:
        """Remove what has expired, and the next to expire while there is too much.

        The newest reply is served whole though it is above the bound: its own links would be dead on arrival.

        Raises:
            StoreError: the store failed; the rest is still there.
        """
        before = self._bytes
        found = self.objects.under(_FOLDER)
        total = sum(kept.size for kept in found)
        newest = _stamp(found[-1]) if found else ""
        for kept in found:
            surplus = total > self._max_bytes and _stamp(kept) != newest
            if not surplus and self._seconds_left(_file(kept)) > 0:
                break
            self.objects.remove(kept.name)
            total -= kept.size
        with self._lock:
            self._bytes += total - before  # what was put since then may not be in the list: it is not lost

    def _seconds_left(self, name: str) -> float:
        found = _NAME.fullmatch(name)
        return int(found[1], 16) / 1000 - self._clock() if found else 0.0

    def _main(self) -> None:
        while not self._stopping.is_set():
            self._due.wait(_TIDY_SECONDS)
            self._due.clear()
            try:
                self.tidy()
            except StoreError:  # it is in the log; there is another time
                self._stopping.wait(1.0)
            except Exception:
                log.exception("linked pictures could not be tidied up")


def _object(name: str) -> str:
    return f"{_FOLDER}/{name}"


def _file(kept: KeptObject) -> str:
    return kept.name.rpartition("/")[2]


def _stamp(kept: KeptObject) -> str:
    return _file(kept).partition("-")[0]
