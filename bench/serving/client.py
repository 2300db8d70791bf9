"""``python -m bench.serving.client``: sends a trace over HTTP from a process of its own, and says what became of it.

Standard input holds one line of JSON (see :func:`main`), standard output gets one: [sent, finished, status] for each
request, in seconds from the trace's start. Connections are kept; a request is sent at its intended time whatever is
still on its way, on a new connection where none is free.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

_LEAD = 0.2  # seconds between the call and the trace's start

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Fate = tuple[float, float, int]


class Client:
    """Keeps connections to one address.

    Args:
        timeout: seconds after which a request counts as failed, status 0.
        fresh: every request on a connection of its own, as those who come once.
    """

    def __init__(self, host: str, port: int, path: str, timeout: float = 300.0, fresh: bool = False) -> None:
        self._host, self._port, self._path, self._timeout = host, port, path, timeout
        self._fresh = fresh
        self._free: list[Connection] = []

    async def post(self, body: bytes) -> int:
        """Send one request and return its status; 0 where there was no reply."""
        try:
            return await asyncio.wait_for(self._post(body), self._timeout)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError, IndexError):
            return 0

    def _kept(self) -> Connection | None:
        """A free connection that its server has not closed meanwhile, as uvicorn does after 5 silent seconds."""
        while self._free:
            reader, writer = self._free.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        return None

    async def _post(self, body: bytes) -> int:
        connection = self._kept() or await asyncio.open_connection(self._host, self._port)
        reader, writer = connection
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"Connection: {'close' if self._fresh else 'keep-alive'}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        status, headers = await _head(reader)
        if headers.get("transfer-encoding", "") == "chunked":
            while size := int(await reader.readline(), 16):
                await reader.readexactly(size + 2)
            await reader.readline()
        else:
            await reader.readexactly(int(headers.get("content-length", "0")))
        if self._fresh or headers.get("connection", "").lower() == "close":
            writer.close()
        else:
            self._free.append(connection)
        return status


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    return int(lines[0].split()[1]), headers


async def play(client: Client, times: Sequence[float], bodies: Sequence[bytes], clients: int | None) -> list[Fate]:
    """Send every body at its time; where ``clients`` is given, as many at once instead."""
    fates: list[Fate] = [(0.0, 0.0, 0)] * len(bodies)
    start = time.monotonic() + _LEAD

    async def one(index: int, intended: float | None) -> None:
        sent = time.monotonic() - start if intended is None else intended
        status = await client.post(bodies[index])
        fates[index] = (sent, time.monotonic() - start, status)

    if clients is not None:
        await asyncio.sleep(_LEAD)
        left = iter(range(len(bodies)))

        async def steadily() -> None:
            for index in left:
                await one(index, None)

        await asyncio.gather(*(steadily() for _ in range(clients)))
        return fates
    async with asyncio.TaskGroup() as group:
        for index, at in enumerate(times):
            await asyncio.sleep(max(start + at - time.monotonic(), 0.0))
            group.create_task(one(index, at))
    return fates


def main() -> None:
    """Read {host, port, path, times, bodies, clients, fresh} and play it."""
    told: dict[str, Any] = json.loads(sys.stdin.readline())
    client = Client(told["host"], told["port"], told["path"], fresh=told["fresh"])
    bodies = [json.dumps(body).encode() for body in told["bodies"]]
    print(json.dumps(asyncio.run(play(client, told["times"], bodies, told["clients"]))))


if __name__ == "__main__":
    main()
