"""How a script gets to Redis and its answer back, and what is known when it doesn't: never sent, not executed, or lost."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from typing import Any, Final, Protocol

from redis.asyncio import Redis
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from inventory_sdk.errors import InventoryError, Overloaded

REFUSED_UNEXECUTED: Final = (MovedError, AskError, TryAgainError, ReadOnlyError, ClusterDownError, BusyLoadingError)
"""MASTERDOWN is a ``ClusterDownError``."""
NO_REPLICAS: Final = "NOREPLICAS"
"""Said at the first write where ``min-replicas-to-write`` is not met: all of our scripts check first, so nothing was written."""
IDLE_BEFORE_PROBE: Final = 1.0
"""Seconds after which a kept connection is looked at before it is used: the server may have closed it."""


class NotExecuted(Overloaded):
    """The script did not run: it was never sent, or the server refused to execute it. Safe to send again at once."""


class ReplyLost(InventoryError):
    """The script was sent and its answer did not come; it may still run until its ``not_after``."""


class Script:
    """A Lua resource file and its digest."""

    __slots__ = ("digest", "name", "text")

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = resources.files("inventory_sdk.stock").joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
        self.digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


@cache
def script(name: str) -> Script:
    """The script of this name, read once."""
    return Script(name)


def _word(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return b"$%d\r\n%b\r\n" % (len(data), data)


class Behind:
    """A command that waits, sent right behind a script on its connection. Once the script has answered, ``connection`` is its
    owner's, who reads the other answer and gives the connection back. ``deadline``: monotonic."""

    __slots__ = ("_release", "command", "connection", "deadline", "level")

    def __init__(self, level: str, words: Sequence[str | int], deadline: float) -> None:
        self.level = level
        self.command = b"*%d\r\n" % len(words) + b"".join(_word(str(word)) for word in words)
        self.deadline = deadline
        self.connection: Any = None
        self._release: Callable[[Any, bool], Awaitable[None]] | None = None

    def lend(self, connection: Any, release: Callable[[Any, bool], Awaitable[None]]) -> None:
        """The script has answered; ``release(connection, whether nothing is outstanding on it)`` takes it back."""
        self.connection = connection
        self._release = release

    async def give_back(self, clean: bool) -> None:
        """``clean``: its answer was read, so the connection can be used again."""
        if self._release is not None:
            await self._release(self.connection, clean)


class Scripts(Protocol):
    """Sends scripts to whoever has their keys. ``client`` is for plain commands; ``timeout`` seconds are one script's."""

    @property
    def client(self) -> Any: ...

    @property
    def timeout(self) -> float: ...

    @property
    def made(self) -> int:
        """Connections that were made so far: each may have met another server than the last."""
        ...

    async def run(self, name: str, keys: Sequence[str], arguments: Sequence[str | bytes], behind: Behind | None = None) -> Any:
        """The script's reply. ``NotExecuted`` and ``ReplyLost`` say what is known otherwise; a script error is a ``ResponseError``.
        ``behind`` is sent along, and keeps the connection if there is a reply."""
        ...

    async def close(self) -> None: ...


class Wire:
    """Runs scripts on connections of its own, made by the client's pool but kept out of it: nothing is retried behind our back,
    and a connection whose answer is outstanding is never used again. One event loop; any number of calls at once."""

    def __init__(self, client: Redis, timeout: float) -> None:
        self.client = client
        self.timeout = timeout
        self.made = 0
        self._idle: list[tuple[Any, float]] = []
        self._busy: set[Any] = set()
        self._heads: dict[tuple[str, str, int], bytes] = {}

    async def run(
        self, name: str, keys: Sequence[str], arguments: Sequence[str | bytes], behind: Behind | None = None, *, asking: bool = False
    ) -> Any:
        """As ``Scripts.run``. ``asking``: the server doesn't own the slot yet, and serves one command behind an ``ASKING``."""
        text = script(name)
        command = self._packed(name, text.digest, keys, arguments)
        connection = await self._connection()
        self._busy.add(connection)
        done = lent = False
        try:
            async with asyncio.timeout(self.timeout):
                try:
                    if asking:
                        await _ask(connection)
                    await connection.send_packed_command(command if behind is None else command + behind.command, False)
                    reply = await connection.read_response()
                except NoScriptError:
                    if behind is not None:
                        # It waited behind nothing. With the script's text it is sent again, where its answer counts.
                        with suppress(ResponseError):
                            await connection.read_response()
                    if asking:
                        await _ask(connection)  # it was good for one command
                    await connection.send_command("EVAL", text.text, len(keys), *keys, *arguments)
                    if behind is not None:
                        await connection.send_packed_command(behind.command, False)
                    reply = await connection.read_response()
            if behind is not None:
                behind.lend(connection, self._release)
                lent = True
            done = True
            return reply
        except REFUSED_UNEXECUTED as error:
            raise NotExecuted(f"Redis did not execute {name}: {error}") from error
        except (
            RedisConnectionError,
            RedisTimeoutError,
            OSError,
            asyncio.IncompleteReadError,
        ) as error:  # OSError: also TimeoutError
            raise ReplyLost(f"no answer from Redis to {name}: {error!r}") from error
        except ResponseError as error:
            done = behind is None  # else an answer is outstanding
            if str(error).startswith(NO_REPLICAS):
                raise NotExecuted(f"Redis did not execute {name}: {error}") from error
            raise
        finally:
            if not lent:
                await self._release(connection, done)

    async def _release(self, connection: Any, clean: bool) -> None:
        self._busy.discard(connection)
        if clean:
            self._idle.append((connection, time.monotonic()))
        else:
            await connection.disconnect(nowait=True)

    def _packed(self, name: str, digest: str, keys: Sequence[str], arguments: Sequence[str | bytes]) -> bytes:
        """EVALSHA on the wire. All but the arguments is the same for every call of a script on a partition."""
        head = self._heads.get((name, keys[0], len(arguments)))
        if head is None:
            words = ["EVALSHA", digest, str(len(keys)), *keys]
            head = b"*%d\r\n" % (len(words) + len(arguments)) + b"".join(map(_word, words))
            self._heads[name, keys[0], len(arguments)] = head
        return head + b"".join(map(_word, arguments))

    async def _connection(self) -> Any:
        while self._idle:
            connection, used = self._idle.pop()
            if time.monotonic() - used < IDLE_BEFORE_PROBE:
                return connection
            try:
                if not await connection.can_read():
                    return connection
            except (RedisError, OSError):
                pass  # the server has closed it: what it says is that a new one is needed
            await connection.disconnect(nowait=True)
        pool: Any = self.client.connection_pool
        connection = pool.make_connection()
        try:
            async with asyncio.timeout(self.timeout):
                await connection.connect()
        except (RedisError, OSError) as error:  # OSError: also TimeoutError
            await connection.disconnect(nowait=True)
            raise NotExecuted(f"Redis can't be reached: {error}") from error
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        # With a time-out of its own, redis-py sends in a task of its own: later than all who are ready to run.
        connection.socket_timeout = None
        self.made += 1
        return connection

    async def close(self) -> None:
        """Closes the connections; calls under way lose their answers."""
        connections = [connection for connection, _ in self._idle] + list(self._busy)
        self._idle.clear()
        for connection in connections:
            await connection.disconnect(nowait=True)


async def _ask(connection: Any) -> None:
    await connection.send_command("ASKING")
    await connection.read_response()
