"""Durability ``replica`` and ``aof``: WAIT and WAITAOF, on the connection that wrote.

Both answer for what *their connection* wrote last, so one that wrote nothing gets its yes at once, whatever the others' fate.

- A batch that somebody wants at such a level sends its script and the WAIT in one go. The script's answer is delivered as
  always; the connection then waits apart, and the next batch takes another. One WAIT serves all who asked for its level.
- What can't ride behind a script that wrote it (a replay, a batch whose answer came from the journal, too many connections
  waiting already) goes through ``mark``: a script that makes sure that the operation stands on this server and then writes
  something harmless, with the WAIT behind. Callers who come while marks are under way share the next one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from redis.exceptions import RedisError, ResponseError

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.model import Position
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.wire import Behind, NotExecuted, ReplyLost

FLAGS: Final = {"replica": "W", "aof": "A", "queue": "Q"}
"""What an operation's flag says of the level that its caller wants."""
MOST_WAITING: Final = 8
"""Connections that wait behind batches at once; a replica that lags must not cost a connection per batch."""
MOST_MARKS: Final = 2
MOST_MARKED: Final = 500
GRACE: Final = 0.25
"""Seconds beyond the time-out in which the server may still say how far it came."""


class _Group:
    """Callers of one partition and level whose operations a mark will vouch for."""

    __slots__ = ("flying", "waiting")

    def __init__(self) -> None:
        self.waiting: list[tuple[str, str, asyncio.Future[str]]] = []
        self.flying = 0


class Waits:
    """One event loop's. ``timeout`` in seconds, by the monotonic clock of this process. What is answered is "" when the level
    was reached, else why not."""

    def __init__(self, replicas: int, timeout: float, in_background: Callable[[Coroutine[Any, Any, Any], str], asyncio.Task[Any]]) -> None:
        self.used = False
        """Whether anybody has asked for such a level: until then no batch looks."""
        self._replicas = replicas
        self._timeout = timeout
        self._in_background = in_background
        self._waiting = 0
        self._groups: dict[tuple[int, str], _Group] = {}

    async def check(self, partition: Partition, level: str) -> None:
        """``InvalidOperation`` where this server can't keep the level at all. Nothing is waited for."""
        behind = self._behind(level, 0.001)
        try:
            await partition.wire.run("mark", _mark_keys(partition), ["", "", "[]"], behind)
        except ReplyLost as error:
            raise NotExecuted(str(error)) from error
        try:
            await self._answer(behind)
        except ResponseError as error:
            text = str(error)
            if "unknown command" in text:
                needs = "WAITAOF, which Redis 7.2 and Valkey have" if level == "aof" else "WAIT"
                text = f"this server does not know {needs}"
            elif "appendonly" in text:
                text = "this Redis keeps no append-only file: set appendonly yes"
            raise InvalidOperation("durability", level, text) from error
        except (RedisError, OSError) as error:
            raise NotExecuted(f"Redis did not say whether it keeps {level}: {error}") from error
        self.used = True

    def behind(self, flags: set[str]) -> Behind | None:
        """What a batch sends behind its script, given the flags of its operations; None: nothing, or there is no room."""
        level = "replica" if "W" in flags else "aof" if "A" in flags else ""
        return self._behind(level, self._timeout) if level and self._waiting < MOST_WAITING else None

    def follow(self, behind: Behind) -> asyncio.Task[str]:
        """The outcome of what was sent behind a script whose answer has come. It runs on whoever stops waiting for it."""
        self._waiting += 1
        return self._in_background(self._followed(behind), f"wait for {behind.level}")

    async def marked(self, partition: Partition, level: str, key: str, position: Position) -> str:
        """Writes behind the operation of this key and position, and waits for that."""
        group = self._groups.setdefault((partition.number, level), _Group())
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        group.waiting.append((key, f"{position.epoch}-{position.sequence}", future))
        if group.flying < MOST_MARKS:
            group.flying += 1
            self._in_background(self._mark_all(partition, level, group), f"marks for {level}")
        try:
            async with asyncio.timeout(self._timeout):
                return await future
        except TimeoutError:
            return f"no answer within {self._timeout:g} s"

    async def _followed(self, behind: Behind) -> str:
        try:
            return await self._outcome(behind)
        finally:
            self._waiting -= 1

    async def _mark_all(self, partition: Partition, level: str, group: _Group) -> None:
        taken: list[tuple[str, str, asyncio.Future[str]]] = []
        why = "its wait was stopped"
        try:
            while group.waiting:
                taken, group.waiting = group.waiting[:MOST_MARKED], group.waiting[MOST_MARKED:]
                taken = [each for each in taken if not each[2].done()]
                if taken:
                    await self._mark(partition, level, taken)
        except Exception as error:
            why = f"its wait was stopped: {error!r}"
            raise
        finally:
            group.flying -= 1
            for _, _, future in taken:
                if not future.done():
                    future.set_result(why)

    async def _mark(self, partition: Partition, level: str, taken: list[tuple[str, str, asyncio.Future[str]]]) -> None:
        behind = self._behind(level, self._timeout)
        asked = json.dumps([value for key, mark, _ in taken for value in (key, mark)])
        stands: list[int] = []
        try:
            await partition.known()
            status, *stands = await partition.wire.run("mark", _mark_keys(partition), [partition.epoch, partition.run_id, asked], behind)
            why = "" if status == b"ok" else f"the partition is being recovered ({status.decode()})"
        except (NotExecuted, ReplyLost, ResponseError, InvalidOperation) as error:
            why = str(error)
        except Exception as error:  # noqa: BLE001 - StockFrozen and whatever else: it is what the callers must hear
            why = repr(error)
        else:
            outcome = await self._outcome(behind)
            why = why or outcome
        for at, (key, mark, future) in enumerate(taken):
            if not future.done():
                gone = "" if not stands or stands[at] else f"Redis does not have {key.partition(chr(31))[2]!r} of {mark} any more"
                future.set_result(why or gone)

    def _behind(self, level: str, timeout: float) -> Behind:
        milliseconds = max(1, int(timeout * 1000))
        words = ("WAIT", self._replicas, milliseconds) if level == "replica" else ("WAITAOF", 1, 0, milliseconds)
        return Behind(level, words, time.monotonic() + timeout)

    async def _outcome(self, behind: Behind) -> str:
        try:
            reply = await self._answer(behind)
        except ResponseError as error:
            return f"Redis said: {error}"
        except (RedisError, OSError) as error:  # OSError: also TimeoutError
            return f"no answer from Redis: {error!r}"
        if behind.level == "aof" and reply[0] < 1:
            return f"not fsynced within {self._timeout:g} s"
        if behind.level == "replica" and reply < self._replicas:
            return f"{reply} of {self._replicas} replicas had it within {self._timeout:g} s"
        return "" if time.monotonic() <= behind.deadline else f"the answer came after {self._timeout:g} s"

    async def _answer(self, behind: Behind) -> Any:
        """The reply, or the error; the connection goes back where it came from."""
        done = False
        try:
            async with asyncio.timeout(max(0.0, behind.deadline - time.monotonic()) + GRACE):
                try:
                    reply = await behind.connection.read_response()
                except ResponseError:
                    done = True
                    raise
            done = True
            return reply
        finally:
            await behind.give_back(done)


def _mark_keys(partition: Partition) -> list[str]:
    return [partition.key(name) for name in ("meta", "results:0", "results:1", "reservations")]
