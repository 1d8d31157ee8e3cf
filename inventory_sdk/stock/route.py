"""Which server has a key, where there are several: the nodes of a Redis Cluster, or the master that Sentinels name.

A server that says MOVED, ASK, TRYAGAIN, READONLY, CLUSTERDOWN, MASTERDOWN or LOADING has executed nothing, so the same is sent
again, a bounded time. Scripts may go to another server as they are: a batch names the run_id of the process that it was made
for, every other one refuses it, and ``not_after`` is only looked at by the process whose clock it was read from.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from random import sample
from typing import Any, Final, Protocol, TypeVar

from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.connection import Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelManagedSSLConnection
from redis.backoff import NoBackoff
from redis.crc import REDIS_CLUSTER_HASH_SLOTS as SLOTS
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from inventory_sdk.metrics.events import Metrics, Retried
from inventory_sdk.stock.wire import NotExecuted

log = logging.getLogger("inventory_sdk.stock")

T = TypeVar("T")
Address = tuple[str, int]

FIRST_PAUSE: Final = 0.01
LONGEST_PAUSE: Final = 0.25
ASKED_AT_ONCE: Final = 3
ANSWER_TIMEOUT: Final = 1.0
"""Seconds that a node has to say who serves what."""
_NOT_A_CONNECTIONS: Final = (
    "connection_class",
    "connection_pool",
    "event_dispatcher",
    "himport_registry",
    "maint_notifications_config",
    "maint_notifications_pool_handler",
    "max_connections",
    "oss_cluster_maint_notifications_handler",
    "redis_connect_func",
    "response_callbacks",
    "retry",
    "retry_on_error",
    "retry_on_timeout",
)
"""What clients keep among their connections' arguments: a pool adds its own, and a retry is ours to make."""
SENTINEL_PERIOD: Final = 1.0
"""Seconds of use after which the Sentinels are asked again: a demoted master that still answers says nothing by itself."""


class Route(Protocol):
    """Who serves a key, as far as is known now."""

    def address(self, key: str) -> Address | None:
        """None: not known."""
        ...

    async def learn(self) -> None:
        """Ask the servers who serves what. A ``RedisError`` or ``OSError`` when none of them can say."""
        ...

    def client(self, address: Address) -> Redis:
        """A client of this server alone, that nobody else uses; not connected yet."""
        ...

    def named(self, host: str, port: int, by: Address) -> Address:
        """What a redirection means that this server sent."""
        ...

    def stale(self, learnt: float) -> bool:
        """Whether what was learnt at this monotonic time should be asked again, aside, while it is still used."""
        ...

    def heard(self, address: Address) -> bool:
        """Whether what this server answers still counts."""
        ...


class ClusterRoute:
    """Slots of a Redis Cluster. The client says where to begin and how to connect; its own retries are not used."""

    def __init__(self, client: RedisCluster) -> None:
        manager = client.nodes_manager
        self._remap = manager.address_remap
        self._kwargs = client.connection_kwargs
        self._kind: Any = client.connection_kwargs["connection_class"]
        self._nodes: list[Address] = [(str(node.host), int(node.port)) for node in manager.startup_nodes.values()]
        self._first = tuple(self._nodes)
        self._owners: list[Address | None] = [None] * SLOTS
        self._slots: dict[str, int] = {}

    def address(self, key: str) -> Address | None:
        """None before the map was read, and for a slot that nobody serves."""
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = key_slot(key.encode())
        return self._owners[slot]

    async def learn(self) -> None:
        """Reads the map from whoever answers first of three nodes at a time, those of the URL last."""
        nodes = sample(self._nodes, len(self._nodes))
        nodes += [node for node in self._first if node not in nodes]
        said = ""
        for start in range(0, len(nodes), ASKED_AT_ONCE):
            asked = {asyncio.ensure_future(self._ask(node)) for node in nodes[start : start + ASKED_AT_ONCE]}
            try:
                for answer in asyncio.as_completed(asked):
                    try:
                        self._owners, self._nodes = await answer
                    except (RedisError, OSError) as error:
                        said = f"{said}; {error!r}"
                    else:
                        return
            finally:
                for each in asked:
                    each.cancel()
                await asyncio.wait(asked)
        raise RedisConnectionError(f"no node of the cluster says who has which slots{said}")

    async def _ask(self, node: Address) -> tuple[list[Address | None], list[Address]]:
        client: Any = self.client(node)
        connection = client.connection_pool.make_connection()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await connection.connect()
                await connection.send_command("CLUSTER", "SLOTS")
                ranges = await connection.read_response()
        finally:
            await connection.disconnect(nowait=True)
        owners: list[Address | None] = [None] * SLOTS
        nodes: list[Address] = []
        for first, last, *servers in ranges:
            named = [self.named(server[0].decode() if server[0] else "", int(server[1]), node) for server in servers]
            owners[first : last + 1] = [named[0]] * (last + 1 - first)
            nodes += [each for each in named if each not in nodes]
        if not nodes:
            raise RedisConnectionError(f"{node[0]}:{node[1]} knows of no slots")
        return owners, nodes

    def named(self, host: str, port: int, by: Address) -> Address:
        """Without a host, or as "?", a node means the one that it was reached at."""
        address = by[0] if host in ("", "?") else host, port
        return self._remap(address) if self._remap is not None else address

    def client(self, address: Address) -> Redis:
        """With the cluster's own settings, also to a node that the map doesn't have yet."""
        return _client(self._kind, self._kwargs, address)

    def stale(self, learnt: float) -> bool:
        """No: a node of a cluster says MOVED, and one that is cut off stops serving by itself."""
        return False

    def heard(self, address: Address) -> bool:
        """Yes: a node that lost a slot may serve others."""
        return True


class SentinelRoute:
    """The one master that the Sentinels name now."""

    def __init__(self, client: Redis) -> None:
        self._pool: Any = client.connection_pool
        self._master: Address | None = None

    def address(self, key: str) -> Address | None:
        """The same for every key."""
        return self._master

    async def learn(self) -> None:
        """Plain connections to a master that is none any more are closed as well."""
        host, port = await self._pool.sentinel_manager.discover_master(self._pool.service_name)
        before, self._master = self._master, (str(host), int(port))
        if before not in (None, self._master):
            log.warning("the master of %r is %s:%d now, it was %s:%d", self._pool.service_name, *self._master, *(before or ()))
            await self._pool.disconnect()

    def client(self, address: Address) -> Redis:
        """With the pool's own settings; it goes to this server and asks no Sentinel."""
        kind = SSLConnection if issubclass(self._pool.connection_class, SentinelManagedSSLConnection) else Connection
        return _client(kind, self._pool.connection_kwargs, address)

    def named(self, host: str, port: int, by: Address) -> Address:
        """As it stands: under Sentinel nobody redirects."""
        return host, port

    def stale(self, learnt: float) -> bool:
        """After a second."""
        return time.monotonic() - learnt > SENTINEL_PERIOD

    def heard(self, address: Address) -> bool:
        """Only the master: a demoted one that still accepts would acknowledge what is going to be thrown away."""
        return address == self._master


def _client(kind: Any, kwargs: Mapping[str, Any], address: Address) -> Redis:
    kept = {name: value for name, value in kwargs.items() if name not in _NOT_A_CONNECTIONS}
    alone = {"host": address[0], "port": address[1], "protocol": 2, "retry": Retry(NoBackoff(), 0), "retry_on_error": []}
    return Redis(connection_pool=ConnectionPool(connection_class=kind, **{**kept, **alone}))


class Guide:
    """Takes a request to whoever has its key: follows redirections, learns anew where it must, insists for ``patience`` seconds."""

    def __init__(self, route: Route, patience: float, metrics: Metrics) -> None:
        self.route = route
        self._patience = patience
        self._metrics = metrics
        self._learning: asyncio.Task[None] | None = None
        self._learnt = float("-inf")

    async def insist(self, key: str, attempt: Callable[[Address, bool], Awaitable[T]]) -> T:
        """What ``attempt(address, asking)`` returns. It raises ``NotExecuted`` from the server's refusal, or from the error that
        kept it from being sent; only then it is called again. ``asking``: the server doesn't own the slot yet."""
        give_up = time.monotonic() + self._patience
        pause = FIRST_PAUSE
        asking = False
        redirected = 0
        if self.route.stale(self._learnt):
            self.doubt()
        address = self.route.address(key)
        while True:
            try:
                if address is None:
                    await self._learn(give_up - time.monotonic())
                    address = self.route.address(key)
                    if address is None:
                        raise NotExecuted(f"no server has {key!r} now")
                return await attempt(address, asking)
            except NotExecuted as refused:
                cause = refused.__cause__
                self._metrics.record(Retried("redis", _word(cause)))
                left = give_up - time.monotonic()
                if left <= 0:
                    raise
                asking = False
                if isinstance(cause, MovedError) and address is not None:
                    # The one that refused knows better than the one that is asked for the whole map.
                    address = self.route.named(cause.host, int(cause.port), address)
                    await self._learn(left)
                    redirected += 1
                elif isinstance(cause, AskError) and address is not None:
                    # This once: the slot stays where it is until all of it has moved.
                    address, asking = self.route.named(cause.host, int(cause.port), address), True
                    redirected += 1
                else:
                    self.doubt()
                    address = None
                    redirected = 0
            if redirected != 1:  # two in a row are a slot on its way, or servers that don't agree
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    def doubt(self) -> asyncio.Task[None]:
        """Learn anew, aside; many doubts are one question."""
        if self._learning is None:
            self._learning = asyncio.get_running_loop().create_task(self._relearn(), name="inventory route")
            self._learning.add_done_callback(self._heard)
        return self._learning

    async def _learn(self, seconds: float) -> None:
        """``NotExecuted`` where nobody can say who serves what."""
        task = self.doubt()
        await asyncio.wait([task], timeout=max(0.0, seconds))
        if not task.done():
            raise NotExecuted("nobody says in time which server has what")
        if task.cancelled():
            raise NotExecuted("closed while asking which server has what")
        error = task.exception()
        if error is not None:
            raise NotExecuted(f"nobody says which server has what: {error}") from error

    async def _relearn(self) -> None:
        try:
            await self.route.learn()
        except (RedisError, OSError) as error:
            self._metrics.record(Retried("route", type(error).__name__))
            raise
        self._learnt = time.monotonic()

    def _heard(self, task: asyncio.Task[None]) -> None:
        self._learning = None
        if not task.cancelled():
            task.exception()  # was counted; that nobody waited for it is no news

    async def close(self) -> None:
        """Ends the question that is under way."""
        if self._learning is not None:
            task = self._learning
            task.cancel()
            await asyncio.wait([task])


def _word(cause: BaseException | None) -> str:
    """A fixed word for metrics."""
    return {"MovedError": "moved", "AskError": "ask", "TryAgainError": "try_again"}.get(type(cause).__name__, "not_executed")
