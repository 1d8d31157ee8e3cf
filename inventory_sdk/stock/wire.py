"""How a script gets to Redis and its answer back, and what is known when it doesn't: never sent, not executed, or lost."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from types import TracebackType
from typing import Any, Final, Protocol, Self

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
SENT_AT_ONCE: Final = 16_384
"""Bytes of a command that go out in the caller's own turn of the event loop: an idle connection's socket takes so many at once."""


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

    def run(self, name: str, keys: Sequence[str], arguments: Sequence[str | bytes], behind: Behind | None = None) -> Awaitable[Any]:
        """The script's reply. ``NotExecuted`` and ``ReplyLost`` say what is known otherwise; a script error is a ``ResponseError``.
        ``behind`` is sent along, and keeps the connection if there is a reply. To be awaited once: the script may have been sent
        already, and its connection is busy until then."""
        ...

    async def close(self) -> None: ...


class Limits:
    """``with limits.limit():`` as ``asyncio.timeout``, where all are equally long: they share one timer. One event loop."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.waiting: deque[Limit] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def limit(self) -> Limit:
        """For what begins now."""
        return Limit(self)

    def begun(self, limit: Limit) -> None:
        """It waits from now on."""
        self.waiting.append(limit)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.seconds, self._due)

    def ended(self) -> None:
        """One has ended: those before it have too, mostly."""
        while self.waiting and self.waiting[0].task is None:
            self.waiting.popleft()

    def close(self) -> None:
        """No timer is left behind; what is still under way has no limit any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _due(self) -> None:
        self._timer = None
        now = time.monotonic()
        while self.waiting and (self.waiting[0].task is None or self.waiting[0].until <= now):
            self.waiting.popleft().expire()
        if self.waiting:
            wait = self.waiting[0].until - now
            self._timer = asyncio.get_running_loop().call_later(wait, self._due)


class Limit:
    """One wait; ``TimeoutError`` once its time is over. Entered at once."""

    __slots__ = ("_cancelling", "_limits", "_over", "task", "until")

    def __init__(self, limits: Limits) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._limits = limits
        self._over = False
        self._cancelling = task.cancelling()
        self.task: asyncio.Task[Any] | None = task
        self.until = time.monotonic() + limits.seconds
        limits.begun(self)

    def expire(self) -> None:
        """Its time is over."""
        if self.task is not None:
            self._over = True
            self.task.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        task, self.task = self.task, None
        self._limits.ended()
        # Cancelled by somebody else too: then it is a cancellation.
        if self._over and task is not None and task.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError):
            raise TimeoutError from error


class _Exchange:
    """A coroutine that begins when it is awaited, and of which nothing is said when it never is: its process may end before."""

    __slots__ = ("_function", "_given")

    def __init__(self, function: Callable[..., Coroutine[Any, Any, Any]], *given: Any) -> None:
        self._function = function
        self._given = given

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._function(*self._given).__await__()


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
        self._limits = Limits(timeout)

    def run(
        self, name: str, keys: Sequence[str], arguments: Sequence[str | bytes], behind: Behind | None = None, *, asking: bool = False
    ) -> Awaitable[Any]:
        """As ``Scripts.run``. ``asking``: the server doesn't own the slot yet, and serves one command behind an ``ASKING``."""
        text = script(name)
        command = self._packed(name, text.digest, keys, arguments)
        if behind is not None:
            command += behind.command
        connection = None if asking or len(command) > SENT_AT_ONCE else self._warm()
        failed = None
        if connection is not None:
            self._busy.add(connection)
            failed = _send(connection, command)
        return _Exchange(self._exchange, connection, failed, text, command, keys, arguments, behind, asking)

    def _warm(self) -> Any:
        """An idle connection that was used a moment ago."""
        if self._idle and time.monotonic() - self._idle[-1][1] < IDLE_BEFORE_PROBE and self._idle[-1][0].is_connected:
            return self._idle.pop()[0]
        return None

    async def _exchange(
        self,
        connection: Any,
        failed: Exception | None,
        text: Script,
        command: bytes,
        keys: Sequence[str],
        arguments: Sequence[str | bytes],
        behind: Behind | None,
        asking: bool,
    ) -> Any:
        """The reply. ``connection``: on which the command was sent already, if there is one; ``failed``: how that went wrong."""
        name, sent = text.name, connection is not None
        if not sent:
            connection = await self._connection()
            self._busy.add(connection)
        done = lent = False
        try:
            with self._limits.limit():
                try:
                    if asking:
                        await _ask(connection)
                    if failed is not None:
                        raise failed
                    if not sent:
                        await connection.send_packed_command(command, False)
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
            raise NotExecuted(f"Redis can't be reached: {str(error) or type(error).__name__}") from error
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        # With a time-out of its own, redis-py sends in a task of its own: later than all who are ready to run.
        connection.socket_timeout = None
        self.made += 1
        return connection

    async def close(self) -> None:
        """Closes the connections; calls under way lose their answers."""
        self._limits.close()
        connections = [connection for connection, _ in self._idle] + list(self._busy)
        self._idle.clear()
        for connection in connections:
            await connection.disconnect(nowait=True)


async def _ask(connection: Any) -> None:
    await connection.send_command("ASKING")
    await connection.read_response()


def _send(connection: Any, command: bytes) -> Exception | None:
    """Hand the command to a connection on which nothing is outstanding, without waiting; what went wrong, if something did."""
    sending = connection.send_packed_command(command, False)
    try:
        sending.send(None)
    except StopIteration:
        return None
    except Exception as error:  # noqa: BLE001  # raised where the answer is waited for
        return error
    # It is with the transport, and only the wait until the socket has taken it is left out: the answer comes after that anyway.
    sending.close()
    return None
