"""A network that takes its time: a TCP proxy that delivers everything late, and loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Self

_CHUNK_BYTES = 1 << 16
_CHUNKS_ON_THE_WAY = 1024


class SlowProxy:
    """Passes bytes to a port of this machine and back, each `delay_s` seconds late, on a port of its own.

    Latency alone: bytes on their way do not hold up those behind them. `delay_s` may change while it serves.
    """

    def __init__(self, to_port: int) -> None:
        self.delay_s = 0.0
        self.port = 0
        self._to_port = to_port

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Self]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        with closing(server):
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            try:
                there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._pass_on(reader, there_writer))
                    tasks.create_task(self._pass_on(there_reader, writer))
            except* OSError:
                pass

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS_ON_THE_WAY)

        async def deliver() -> None:
            while True:
                due, data = await on_the_way.get()
                await asyncio.sleep(due - loop.time())
                if not data:
                    return
                writer.write(data)
                await writer.drain()

        with closing(writer):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(deliver())
                data = b"-"
                while data:
                    data = await reader.read(_CHUNK_BYTES)
                    await on_the_way.put((loop.time() + self.delay_s, data))
