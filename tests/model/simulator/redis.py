"""The double of Redis: the SDK's real scripts on a small Redis in Lua, behind connections that redis-py's client and our Wire use.

The Lua runtime is made once per operating-system process and each script is compiled once; a server is only a table of keys.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import lupa.lua51
from redis.asyncio import Redis
from redis.exceptions import (
    BusyLoadingError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from inventory_sdk.servers import PLAIN_TIMEOUT
from tests.model.simulator.clock import EPOCH

if TYPE_CHECKING:
    from tests.model.simulator.world import Process, World

_ERRORS: Final[dict[str, type[Exception]]] = {
    "NOSCRIPT": NoScriptError,
    "READONLY": ReadOnlyError,
    "OOM": OutOfMemoryError,
    "LOADING": BusyLoadingError,
}


class Runtime:
    """One Lua, with the small Redis in it."""

    def __init__(self) -> None:
        self.lua = lupa.lua51.LuaRuntime(encoding=None, unpack_returned_tuples=True)
        text = Path(__file__).with_name("redis.lua").read_bytes()
        self.out = self.lua.execute(text)
        self._compiled: dict[bytes, Any] = {}

    def compiled(self, text: bytes) -> Any:
        """A script's function, compiled when first seen."""
        found = self._compiled.get(text)
        if found is None:
            found = self._compiled[text] = self.out[b"compile"](text)
        return found

    def plain(self, value: Any) -> Any:
        """A reply as redis-py would read it (RESP2): bytes, whole numbers, None, lists; errors are returned as exceptions."""
        if isinstance(value, float):
            return int(value)
        if value is False:
            return None
        if value is True:
            return 1
        if lupa.lua51.lua_type(value) == "table":
            if value[b"err"] is not None:
                return error_of(value[b"err"].decode())
            if value[b"ok"] is not None:
                return value[b"ok"]
            found = []
            at = 1
            while (each := value[at]) is not None:
                found.append(self.plain(each))
                at += 1
            return found
        return value


def error_of(text: str) -> Exception:
    """The exception that redis-py raises for an error reply."""
    word, _, rest = text.partition(" ")
    return _ERRORS[word](rest) if word in _ERRORS else ResponseError(text)


@cache
def runtime() -> Runtime:
    """This process' Lua."""
    return Runtime()


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """What a server was told and what it said, for the comparison with a real one."""

    life: str
    """Of which server, until it was emptied."""
    run_id: str
    now_ms: int
    text: bytes
    keys: list[bytes]
    arguments: list[bytes]
    answer: Any


class Server:
    """One redis-server process. ``state`` is its memory, ``known`` the scripts that it has seen."""

    def __init__(self, world: World, run_id: str, state: Any, skew_ms: int = 0) -> None:
        self.world = world
        self.name = run_id
        self.run_id = "" if world.anonymous else run_id
        """What it tells of itself."""
        self.state = state
        self.skew_ms = skew_ms
        self.up = True
        self.demoted = False
        self.trouble = b""
        """``xadd``: entries can't be added; ``full``: no memory."""
        self.copied = self.synced = self.length()
        """Write groups that its replica has, and that its disk has."""
        self.alone = False
        """Its replica has been promoted and listens no more."""
        self._life = 0
        """How often it was emptied: what was on its way to copies then is gone."""
        self._waiting: list[tuple[str, int, Callable[[int], None]]] = []
        self.known: dict[bytes, bytes] = {}
        self.connections: dict[SimConnection, None] = {}

    def now_ms(self) -> int:
        return int((EPOCH + self.world.loop.time()) * 1000) + self.skew_ms

    def flush(self) -> None:
        """FLUSHALL: its copies follow."""
        self.state = runtime().out[b"new"]()
        self.copied = self.synced = 0
        self._life += 1
        for connection in self.connections:
            connection.flushed()

    def length(self) -> int:
        """Write groups in the log."""
        return int(runtime().out[b"length"](self.state))

    def execute(self, words: Sequence[bytes]) -> Any:
        """One command; an exception is the reply's error."""
        name = words[0].upper()
        if name in (b"EVALSHA", b"EVAL"):
            return self._script(name, words)
        if self.demoted and name in (b"SET", b"HDEL", b"XADD", b"HSET", b"DEL"):
            return ReadOnlyError("You can't write against a read only replica.")
        lua = runtime()
        fine, reply, added, counters = lua.out[b"command"](self.state, self.now_ms(), 0, self.run_id.encode(), self.trouble, *words)
        self._observe(added, counters)
        return lua.plain(reply) if fine else error_of(reply.decode())

    def _script(self, name: bytes, words: Sequence[bytes]) -> Any:
        if name == b"EVAL":
            text = words[1]
            self.known[hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()] = text
        else:
            found = self.known.get(words[1].lower())
            if found is None:
                return NoScriptError("No matching script.")
            text = found
        if self.demoted:
            return ReadOnlyError("You can't write against a read only replica.")
        lua = runtime()
        count = int(words[2])
        keys, arguments = words[3 : 3 + count], words[3 + count :]
        now_ms = self.now_ms()
        fine, reply, added, counters = lua.out[b"script"](
            self.state,
            now_ms,
            0,
            self.run_id.encode(),
            self.trouble,
            lua.compiled(text),
            lua.lua.table_from(keys),
            lua.lua.table_from(arguments),
        )
        self._observe(added, counters)
        answer = lua.plain(reply) if fine else error_of(reply.decode(errors="replace"))
        if self.world.scripts is not None and not self.trouble:
            life = f"{self.name}.{self._life}"
            self.world.scripts.append(ScriptCall(life, self.run_id, now_ms, text, list(keys), list(arguments), answer))
        return answer

    # Copies and the disk -----------------------------------------------------------------------------------------------------

    def written(self) -> int:
        """After a command: how long the log is. What is new reaches the replica and the disk some time later."""
        length = self.length()
        if self.world.copies and length > max(self.copied, self.synced):
            world = self.world
            lag = world.random.uniform(0.3, 4.0) if world.chance("replica_lags") else world.random.uniform(0.0003, 0.004)
            life = self._life
            world.later(lag, lambda: self._reached("copied", length, life))
            world.later(world.random.uniform(0.001, 0.3), lambda: self._reached("synced", length, life))
        return length

    def _reached(self, which: str, length: int, life: int) -> None:
        if not self.up or life != self._life or (which == "copied" and self.alone):
            return
        setattr(self, which, max(getattr(self, which), length))
        for waiting in list(self._waiting):
            if waiting[0] == which and waiting[1] <= length:
                self._waiting.remove(waiting)
                waiting[2](1)

    def wait(self, words: Sequence[bytes], length: int, answer: Callable[[Any], None]) -> None:
        """WAIT and WAITAOF: ``answer`` is called once they reply, for what stood at ``length`` in the log."""
        which = "copied" if words[0] == b"WAIT" else "synced"

        def reply(number: int) -> None:
            answer(number if which == "copied" else [number, 0])

        if getattr(self, which) >= length:
            reply(1)
            return
        waiting = (which, length, reply)
        self._waiting.append(waiting)

        def give_up() -> None:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
                reply(0)

        self.world.later(int(words[-1]) / 1000, give_up)

    def _observe(self, added: Any, counters: Any) -> None:
        """The auditor sees what was written, whoever wrote it."""
        auditor = self.world.auditor
        if counters is not None:
            flat = runtime().plain(counters)
            for field, value in zip(flat[::2], flat[1::2], strict=True):
                auditor.counted(self, field.decode(), int(value))
        if added is not None:
            flat = runtime().plain(added)
            for at in range(0, len(flat), 3):
                key = flat[at].decode()
                if key.endswith(":journal"):
                    auditor.journaled(self, int(key.partition("}")[0].rpartition(":")[2]), flat[at + 1].decode(), flat[at + 2].decode())


class SimConnection:
    """What redis-py's connections do for the client and the Wire, over the simulated network. TCP: in order, or broken."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.world = process.world
        self.server: Server | None = None
        self.broken = False
        self.is_connected = True
        """What breaks is seen at the next use."""
        self.socket_timeout: float | None = None
        self._replies: deque[Any] = deque()
        self._last_arrival = 0.0
        self._wrote = 0
        """Where the log stood after the last command of this connection that wrote."""

    async def connect(self) -> None:
        if self.server is not None and not self.broken:
            return
        await self.process.away(self.world.network.latency())
        server = self.world.redis
        if not server.up:
            raise RedisConnectionError("connection refused")
        self.server = server
        self.broken = False
        self._wrote = 0
        server.connections[self] = None

    async def disconnect(self, *_: Any, **__: Any) -> None:
        if self.server is not None:
            self.server.connections.pop(self, None)
        self.broken = True
        self._replies.clear()

    async def can_read(self, *_: Any, **__: Any) -> bool:
        return self.broken

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        data = command if isinstance(command, bytes) else b"".join(command)
        self._send(*_unpacked(data))

    async def send_command(self, *words: Any, **_: Any) -> None:
        self._send([word if isinstance(word, bytes) else str(word).encode() for word in words])

    async def read_response(self, *_: Any, **__: Any) -> Any:
        if not self._replies:
            raise RedisConnectionError("connection lost")
        future = self._replies.popleft()
        reply = await future
        if isinstance(reply, Exception):
            raise reply
        return reply

    def flushed(self) -> None:
        """The log began anew."""
        self._wrote = 0

    def cut(self, error: str = "connection reset by peer") -> None:
        """The connection breaks: whoever waits hears of it."""
        self.broken = True
        if self.server is not None:
            self.server.connections.pop(self, None)
        for future in list(self._replies):
            if not future.done():
                future.set_result(RedisConnectionError(error))
        for future in list(self._waiting):
            if not future.done():
                future.set_result(RedisConnectionError(error))

    _waiting: Any = ()

    def _send(self, *commands: list[bytes]) -> None:
        """Commands of one packet: one fate for all of them."""
        server = self.server
        if self.broken or server is None:
            raise RedisConnectionError("connection lost")
        loop = self.world.loop
        futures = [loop.create_future() for _ in commands]
        self._replies.extend(futures)
        self._waiting = [each for each in self._waiting if not each.done()] + futures
        fate = self.world.network.request(self, commands[0])
        if fate.lost:
            return
        at = max(self._last_arrival + 1e-6, loop.time() + fate.delay)  # timers of one moment keep no order
        self._last_arrival = at

        def answered(future: Any, reply: Any) -> None:
            if not fate.silent and not fate.reset:
                self.world.later(fate.back, lambda: future.done() or future.set_result(reply))

        def arrive() -> None:
            if not server.up:
                self.cut()
                return
            for words, future in zip(commands, futures, strict=True):
                if words[0] in (b"WAIT", b"WAITAOF"):
                    server.wait(words, self._wrote, partial(answered, future))
                    continue
                before = server.length()
                reply = server.execute(words)
                after = server.written()
                if after > before:
                    self._wrote = after
                answered(future, reply)
            if fate.reset:
                self.cut()

        self.world.later(at - loop.time(), arrive)
        self.process.maybe_dies()


def _unpacked(data: bytes) -> list[list[bytes]]:
    commands: list[list[bytes]] = []
    at = 0
    while at < len(data):
        start, at = at, data.index(b"\r\n", at) + 2
        words: list[bytes] = []
        for _ in range(int(data[start + 1 : at - 2])):
            end = data.index(b"\r\n", at)
            size = int(data[at + 1 : end])
            words.append(data[end + 2 : end + 2 + size])
            at = end + 4 + size
        commands.append(words)
    return commands


class SimPool:
    """Makes connections of one process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.connection_kwargs: dict[str, Any] = {"protocol": 2}
        self.connection_class = SimConnection
        self.idle: list[SimConnection] = []

    def make_connection(self) -> SimConnection:
        return SimConnection(self._process)

    def get_encoder(self) -> Any:
        raise NotImplementedError("the simulator's client encodes for itself")

    async def disconnect(self, *_: Any, **__: Any) -> None:
        for connection in self.idle:
            await connection.disconnect()
        self.idle.clear()

    async def aclose(self) -> None:
        await self.disconnect()


class SimClient(Redis):
    """redis-py's client, its commands and its reading of replies; only the way to the server is ours."""

    def __init__(self, process: Process) -> None:
        self._sim_pool = SimPool(process)
        pool: Any = self._sim_pool
        super().__init__(connection_pool=pool)

    async def execute_command(self, *words: Any, **options: Any) -> Any:
        pool = self._sim_pool
        connection = pool.idle.pop() if pool.idle else pool.make_connection()
        done = False
        try:
            async with asyncio.timeout(PLAIN_TIMEOUT):
                await connection.connect()
                await connection.send_command(*words)
                reply = await connection.read_response()
            done = True
        except TimeoutError as error:
            raise RedisTimeoutError("Timeout reading from the simulated Redis") from error
        finally:
            if done:
                pool.idle.append(connection)
            else:
                await connection.disconnect()
        callback = self.response_callbacks.get(str(words[0]))
        options.pop("keys", None)
        return callback(reply, **options) if callback is not None else reply

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await self._sim_pool.disconnect()
