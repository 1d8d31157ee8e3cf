"""Processes that calculate, as many as the policy says, made when they are needed and kept for the next run.

A process has one run at a time. One whose run is given up, at its timeout or because its lease is gone, is killed: nothing else
stops a calculation that does not come back to its event loop.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from multiprocessing.spawn import get_preparation_data
from pathlib import Path
from typing import Any, Final

from inventory_sdk.redistribute.child import HEAD, frame
from inventory_sdk.redistribute.meter import Meter
from inventory_sdk.weave import Site

START: Final = 60.0
"""Seconds for a new process to import what its parent has imported."""
TICKS: Final = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class TimeUp(Exception):
    """A run did not end in its time; its process was killed."""


class ProcessDied(Exception):
    """The process ended during a run: by itself, or by the system when it ran out of memory."""


class Child:
    """One process. ``run`` and ``kill`` are all one does with it."""

    def __init__(self, process: asyncio.subprocess.Process, replies: asyncio.StreamReader, transport: asyncio.BaseTransport) -> None:
        self._process = process
        self._replies = replies
        self._transport = transport

    @classmethod
    async def start(cls, niceness: int) -> Child:
        """A process that is ready; ``ProcessDied`` says what it ended with."""
        ours, theirs = os.pipe()
        reading = os.fdopen(ours, "rb", buffering=0)
        loop = asyncio.get_running_loop()
        replies = asyncio.StreamReader()
        try:
            transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(replies), reading)
        except BaseException:
            reading.close()
            os.close(theirs)
            raise
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                f"from inventory_sdk.redistribute.child import main; main({theirs}, {niceness})",
                stdin=asyncio.subprocess.PIPE,
                pass_fds=(theirs,),
                start_new_session=True,
                env=_environment(),
            )
        except BaseException:
            transport.close()
            raise
        finally:
            os.close(theirs)
        child = cls(process, replies, transport)
        try:
            async with asyncio.timeout(START):
                data = get_preparation_data("inventory calculation")
                data.pop("authkey", None)  # multiprocessing's own secret, which can't be pickled and is not needed here
                child._send(data)
                await child._read()
        except BaseException as error:
            await child.kill()
            if isinstance(error, TimeoutError):
                raise ProcessDied(f"it was not ready within {START:g} s") from error
            raise
        return child

    async def run(self, site: Site, arguments: dict[str, Any], timeout: float, meter: Meter) -> Any:
        """The function's result, or what it raises. ``TimeUp``, ``ProcessDied``; after these, and when cancelled, it is dead."""
        module, _, name = site.label.partition(":")
        before = self._spent()
        try:
            async with asyncio.timeout(timeout):
                self._send((module, name, arguments))
                returned, result, spent = await self._read()
        except BaseException as error:
            meter.cpu_seconds += max(0.0, self._spent() - before)
            await self.kill()
            if isinstance(error, TimeoutError):
                raise TimeUp from error
            raise
        meter.cpu_seconds += spent
        if not returned:
            raise result
        return result

    @property
    def alive(self) -> bool:
        """It has not ended."""
        return self._process.returncode is None

    async def kill(self) -> None:
        """End it at once, and wait until it has; a caller's cancellation waits too, or it would be left behind."""
        if self.alive:
            self._process.kill()
        ended = asyncio.ensure_future(self._process.wait())
        cancelled = False
        while not ended.done():
            try:
                await asyncio.shield(ended)
            except asyncio.CancelledError:
                cancelled = True
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._transport.close()
        if cancelled:
            raise asyncio.CancelledError

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(frame(message))

    async def _read(self) -> Any:
        try:
            head = await self._replies.readexactly(HEAD.size)
            body = await self._replies.readexactly(HEAD.unpack(head)[0])
        except asyncio.IncompleteReadError as error:
            code = await self._process.wait()
            raise ProcessDied(f"it ended with exit code {code}") from error
        return pickle.loads(body)  # noqa: S301  # from our own child

    def _spent(self) -> float:
        """CPU seconds of the process so far; 0 where the system does not say."""
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return 0.0
        fields = text[text.rindex(")") + 2 :].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


class Pool:
    """The processes of one event loop. Whoever runs here is bounded already, so there is no line."""

    def __init__(self, niceness: int) -> None:
        self._niceness = niceness
        self._idle: list[Child] = []

    async def run(self, site: Site, arguments: dict[str, Any], timeout: float, meter: Meter) -> Any:
        """As ``Child.run``, in one that is free, or new."""
        child = None
        while self._idle and child is None:
            child = self._idle.pop()
            if not child.alive:
                await child.kill()
                child = None
        if child is None:
            child = await Child.start(self._niceness)
        try:
            return await child.run(site, arguments, timeout, meter)
        finally:
            if child.alive:
                self._idle.append(child)

    async def close(self) -> None:
        """End those that are idle; runs have ended by now."""
        while self._idle:
            await self._idle.pop().kill()


def _environment() -> dict[str, str]:
    """The child finds our package where we did, before it is told the rest of the path."""
    home = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))}
