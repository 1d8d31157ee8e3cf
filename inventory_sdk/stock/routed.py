"""Scripts and plain commands on many servers: each goes to the one that has its key (``route.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from types import TracebackType
from typing import Any, Self

from redis.asyncio import ConnectionPool, Redis, RedisCluster, SentinelConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from inventory_sdk.metrics.events import Metrics
from inventory_sdk.stock.route import Address, ClusterRoute, Guide, SentinelRoute
from inventory_sdk.stock.wire import REFUSED_UNEXECUTED, Behind, NotExecuted, ReplyLost, Scripts, Wire


def scripts_on(client: Any, timeout: float, metrics: Metrics) -> Scripts:
    """What sends scripts for this client: one server's wire, or wires to all that Redis Cluster or Sentinel name."""
    if isinstance(client, RedisCluster):
        guide = Guide(ClusterRoute(client), timeout, metrics)
        return RoutedScripts(guide, timeout, PlainCommands(guide))
    if isinstance(getattr(client, "connection_pool", None), SentinelConnectionPool):
        return RoutedScripts(Guide(SentinelRoute(client), timeout, metrics), timeout, client)
    return Wire(client, timeout)


class RoutedScripts:
    """One wire per server; ``client`` is for plain commands, of which nothing is known."""

    def __init__(self, guide: Guide, timeout: float, client: Any) -> None:
        self.client = client
        self.timeout = timeout
        self._guide = guide
        self._wires: dict[Address, Wire] = {}

    @property
    def made(self) -> int:
        """Connections that were made so far, to any server."""
        return sum(wire.made for wire in self._wires.values())

    async def run(self, name: str, keys: Sequence[str], arguments: Sequence[str | bytes], behind: Behind | None = None) -> Any:
        """As ``Wire.run``, by the server that has the first key. Nothing is sent twice but what was refused unexecuted."""

        async def attempt(address: Address, asking: bool) -> Any:
            return await self._run(address, name, keys, arguments, behind, asking)

        try:
            return await self._guide.insist(keys[0], attempt)
        except ReplyLost:
            self._guide.doubt()
            raise

    async def _run(
        self, address: Address, name: str, keys: Sequence[str], arguments: Sequence[str | bytes], behind: Behind | None, asking: bool
    ) -> Any:
        wire = self._wires.get(address)
        if wire is None:
            wire = self._wires[address] = Wire(self._guide.route.client(address), self.timeout)
        reply = await wire.run(name, keys, arguments, behind, asking=asking)
        if not self._guide.route.heard(address):
            if behind is not None:
                await behind.give_back(False)
            raise ReplyLost(f"{name} was answered by {address[0]}:{address[1]}, which is the master no more")
        return reply

    async def close(self) -> None:
        """Closes the connections; calls under way lose their answers."""
        await self._guide.close()
        for wire in self._wires.values():
            await wire.close()
        self._wires.clear()
        if isinstance(self.client, PlainCommands):
            await self.client.aclose()


class PlainCommands(Redis):
    """redis-py's commands on the nodes of a cluster, by the key that each names; nothing is sent twice but what a node refused
    unexecuted. RedisCluster's own way sends ASKING on one connection and the command on another."""

    def __init__(self, guide: Guide) -> None:
        # Never connected: its commands go out through the nodes' own clients.
        super().__init__(connection_pool=ConnectionPool(protocol=2))
        self._guide = guide
        self._nodes: dict[Address, Redis] = {}

    async def execute_command(self, *arguments: Any, **options: Any) -> Any:
        """One command's answer; a ``RedisError`` as from any client."""
        (answer,) = await self.execute_all([(arguments, options)])
        return answer

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Any:
        """Commands that are sent together, each node's in their order. Not a transaction: those are scripts here."""
        if transaction:
            raise NotImplementedError("a transaction over a cluster's nodes; write a script, or pipeline(transaction=False)")
        return _Together(self)

    async def execute_all(self, commands: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        """The answers, in order; the first error is raised, what stood before it was executed."""
        answers: list[Any] = []
        for key, group in groupby(commands, lambda command: _key(command[0])):
            waiting = list(group)

            async def attempt(address: Address, asking: bool, waiting: list[Any] = waiting) -> None:
                await self._send(address, asking, waiting, answers)

            try:
                await self._guide.insist(key, attempt)
            except NotExecuted as error:
                raise error.__cause__ or RedisConnectionError(str(error)) from error
            except (RedisError, OSError):
                self._guide.doubt()
                raise
        return answers

    async def _send(self, address: Address, asking: bool, waiting: list[Any], answers: list[Any]) -> None:
        """Moves from ``waiting`` to ``answers`` what was executed; ``NotExecuted`` at the first that was not."""
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = self._guide.route.client(address)
        async with node.pipeline(transaction=False) as pipeline:
            for arguments, options in waiting:
                if asking:
                    pipeline.execute_command("ASKING")  # on the same connection, good for one command
                pipeline.execute_command(*arguments, **options)
            replies = await pipeline.execute(raise_on_error=False)
        for reply in replies[1::2] if asking else replies:
            if isinstance(reply, REFUSED_UNEXECUTED):
                raise NotExecuted(f"{address[0]}:{address[1]} did not execute {waiting[0][0][0]}: {reply}") from reply
            if isinstance(reply, BaseException):
                raise reply
            answers.append(reply)
            del waiting[0]

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Closes the nodes' clients."""
        for node in self._nodes.values():
            await node.aclose()
            await node.connection_pool.disconnect()
        self._nodes.clear()
        await super().aclose(close_connection_pool)


class _Together(Redis):
    """Collects commands until ``execute``."""

    def __init__(self, client: PlainCommands) -> None:
        super().__init__(connection_pool=client.connection_pool)
        self._client = client
        self._commands: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._commands.clear()

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        self._commands.append((arguments, options))
        return self

    async def execute(self) -> list[Any]:
        commands, self._commands = self._commands, []
        return await self._client.execute_all(commands)


def _key(arguments: Sequence[Any]) -> str:
    """The key that says where a command goes; all keys of a command are of one partition."""
    words = [word.decode() if isinstance(word, bytes) else str(word) for word in arguments]
    name = words[0].upper()
    if name in ("XREAD", "XREADGROUP"):
        return words[[word.upper() for word in words].index("STREAMS") + 1]
    at = 3 if name in ("EVAL", "EVALSHA") else 1
    if len(words) <= at:
        raise NotImplementedError(f"{name} names no key: ask a node for it, not a cluster")
    return words[at]
