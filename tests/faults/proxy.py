"""A TCP proxy that does to connections what networks and dying servers do. One for any server: it knows no protocol."""

from __future__ import annotations

import asyncio
from typing import Self


class Proxy:
    """Listens on a free port of its own, kept for its life, and passes on to ``target``. Changing ``target`` moves what connects
    from then on."""

    def __init__(self, host: str, port: int) -> None:
        self.target = host, port
        self.port = 0
        self.connections = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._mute = False

    async def __aenter__(self) -> Self:
        await self.allow()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        if self._pumps:
            await asyncio.wait(self._pumps)

    async def allow(self) -> None:
        """Take connections (again)."""
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """As a server that went down: connections break, new ones are refused."""
        if self._server is not None:
            self._server.close()
            self.cut()
            await self._server.wait_closed()
            self._server = None
        self.cut()

    def cut(self) -> None:
        """Break what is connected."""
        self.mute(False)
        self.resume()
        for writer in self._writers:
            writer.transport.abort()
        for pump in self._pumps:
            pump.cancel()

    def hold(self) -> None:
        """Nothing comes through, in either direction, and nothing breaks: a hanging server, a lost route."""
        self._flowing.clear()

    def resume(self) -> None:
        """What was held goes on."""
        self._flowing.set()

    def mute(self, silent: bool = True) -> None:
        """Requests arrive and are executed; their answers are swallowed until the next ``cut``."""
        self._mute = silent

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        self.connections += 1
        self._writers |= {writer, far_writer}
        for source, sink, answers in ((reader, far_writer, False), (far_reader, writer, True)):
            pump = asyncio.create_task(self._pump(source, sink, answers))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool) -> None:
        try:
            while data := await source.read(65536):
                await self._flowing.wait()
                if answers and self._mute:
                    continue
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            sink.transport.abort()
        finally:
            sink.close()
            self._writers.discard(sink)
