"""The benches' client loses no request for reasons that are its own."""

from __future__ import annotations

import asyncio

from bench.serving.client import Client


def test_a_connection_that_its_server_has_closed_meanwhile_is_not_used_again() -> None:
    """It counted as an error of the server whose connections are kept for less long: one request in thirty."""

    async def reply_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        await reader.readexactly(length)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async def draw() -> list[int]:
        server = await asyncio.start_server(reply_once, "127.0.0.1", 0)
        async with server:
            client = Client("127.0.0.1", server.sockets[0].getsockname()[1], "/")
            statuses = []
            for _ in range(3):
                statuses.append(await client.post(b"{}"))
                await asyncio.sleep(0.05)  # for the word of its end to arrive
            return statuses

    assert asyncio.run(draw()) == [200, 200, 200]
