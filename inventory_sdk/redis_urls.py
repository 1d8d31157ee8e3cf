"""Redis clients of a cluster and of a master under Sentinel, from a URL or from a client of the user's; none of them retries.

``redis+cluster://[user:password@]host:port,host:port/`` names some nodes of a Redis Cluster, the others are found.
``redis+sentinel://[user:password@]host:port,host:port/service/db`` names Sentinels, and the master that they watch. Credentials are
those of Redis; Sentinels that want their own get ``?sentinel_username=…&sentinel_password=…``. With ``rediss+`` all connections
are encrypted. The query takes what redis-py's connections take (``ssl_ca_certs``, ``socket_connect_timeout``, …).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from redis.asyncio import Redis, RedisCluster, Sentinel, SentinelConnectionPool
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, SentinelManagedSSLConnection
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from inventory_sdk.errors import InvalidOperation

CLUSTER_SCHEMES: Final = ("redis+cluster", "rediss+cluster")
SENTINEL_SCHEMES: Final = ("redis+sentinel", "rediss+sentinel")
ANSWER_TIMEOUT: Final = 1.0
"""Seconds that one Sentinel has for its answer: the others are asked at the same time."""
PLAIN_TIMEOUT: Final = 3.0
"""Seconds for plain reads on many servers (a blocking one takes one): while a node hangs, another one is asked after that."""

_DECIDED_HERE: Final = frozenset(
    {
        "cluster_error_retry_attempts",
        "connection_class",
        "connection_pool",
        "db",
        "decode_responses",
        "encoding",
        "encoding_errors",
        "event_dispatcher",
        "himport_registry",
        "host",
        "legacy_responses",
        "maint_notifications_config",
        "maint_notifications_pool_handler",
        "max_connections",
        "orig_host_address",
        "oss_cluster_maint_notifications_handler",
        "orig_socket_connect_timeout",
        "orig_socket_timeout",
        "port",
        "protocol",
        "redis_connect_func",
        "response_callbacks",
        "retry",
        "retry_on_error",
        "retry_on_timeout",
        "socket_timeout",
    }
)
"""What a client adds to its connections' arguments, and what we decide ourselves."""

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Places:
    """A URL taken apart: ``path`` without slashes at its ends, ``options`` as redis-py's connections take them."""

    addresses: Sequence[Address]
    path: str
    options: Mapping[str, Any]
    encrypted: bool


def places(url: str) -> Places:
    """``InvalidOperation`` where a host is missing or a port is none; the URL itself may carry a password and is not shown."""
    parts = urlsplit(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    default = 26379 if parts.scheme in SENTINEL_SCHEMES else 6379
    addresses: list[Address] = []
    for host in hosts.split(","):
        try:
            one = urlsplit(f"//{host}")
            if not one.hostname:
                raise ValueError("no host")
            addresses.append((one.hostname, one.port or default))
        except ValueError:
            raise InvalidOperation("redis", hosts, f"{host!r} must be host or host:port, several joined with commas") from None
    query = [(name, value) for name, value in parse_qsl(parts.query) if not name.startswith("sentinel_")]
    options: dict[str, Any] = dict(parse_url(f"redis://{credentials}{at}{addresses[0][0]}/?{urlencode(query)}"))
    for name in ("host", "port", "db"):
        options.pop(name, None)
    return Places(addresses, parts.path.strip("/"), options, parts.scheme.startswith("rediss"))


def check_places(url: str) -> None:
    """``InvalidOperation`` for a cluster's or a Sentinel's URL that no client could be made from. Connects to nothing."""
    given = places(url)
    if urlsplit(url).scheme in SENTINEL_SCHEMES:
        service, _, database = given.path.partition("/")
        if not service or not (database or "0").isdecimal():
            raise InvalidOperation("redis", f"…/{given.path}", "must end in /service or /service/db: the name that the Sentinels watch")
    elif given.path not in ("", "0"):
        raise InvalidOperation("redis", f"…/{given.path}", "a cluster has database 0 only")


def cluster_client(redis: str | Redis | RedisCluster, connect_timeout: float) -> RedisCluster:
    """A cluster's client for the running event loop: bytes, RESP2, nothing but redirections is sent twice."""
    options: dict[str, Any]
    if isinstance(redis, str):
        check_places(redis)
        given = places(redis)
        nodes = [ClusterNode(host, port) for host, port in given.addresses]
        options = {"socket_connect_timeout": connect_timeout, **given.options}
        if given.encrypted:
            options["ssl"] = True
    else:
        assert isinstance(redis, RedisCluster)
        manager = redis.nodes_manager
        nodes = [ClusterNode(node.host, node.port) for node in manager.startup_nodes.values()]
        accepted = inspect.signature(RedisCluster.__init__).parameters
        options = {name: value for name, value in _kept(redis.connection_kwargs).items() if name in accepted}
        options["address_remap"] = manager.address_remap
        if issubclass(redis.connection_kwargs["connection_class"], SSLConnection):
            options["ssl"] = True
    return RedisCluster(
        startup_nodes=nodes,
        # While slots are nobody's, the others still sell.
        require_full_coverage=False,
        retry=Retry(NoBackoff(), 0),
        decode_responses=False,
        protocol=2,
        socket_timeout=PLAIN_TIMEOUT,
        **options,
    )


def sentinel_client(redis: str | Redis | RedisCluster, connect_timeout: float) -> Redis:
    """A client of the master that the Sentinels name, for the running event loop: bytes, RESP2, nothing is sent twice."""
    own: dict[str, Any] = {"socket_timeout": ANSWER_TIMEOUT, "socket_connect_timeout": ANSWER_TIMEOUT, "protocol": 2}
    own["retry"] = Retry(NoBackoff(), 0)
    options: dict[str, Any]
    database: Any
    if isinstance(redis, str):
        check_places(redis)
        given = places(redis)
        service, _, database = given.path.partition("/")
        addresses = given.addresses
        options = {"socket_connect_timeout": connect_timeout, **given.options}
        encrypted = given.encrypted
        asked = dict(parse_qsl(urlsplit(redis).query))
        for name in ("username", "password"):
            if f"sentinel_{name}" in asked:
                own[name] = asked[f"sentinel_{name}"]
        own["ssl"] = encrypted
        own |= {name: value for name, value in options.items() if name.startswith("ssl_")}
    else:
        pool: Any = getattr(redis, "connection_pool", None)
        service, database = pool.service_name, pool.connection_kwargs.get("db", 0)
        if not pool.is_master:
            raise InvalidOperation("redis", redis, "is a client of replicas: make it with sentinel.master_for(…)")
        known = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
        addresses = [(kwargs["host"], kwargs["port"]) for kwargs in known]
        own = {**_kept(pool.sentinel_manager.sentinel_kwargs), **own}
        if "ssl" in pool.sentinel_manager.sentinel_kwargs:
            own["ssl"] = pool.sentinel_manager.sentinel_kwargs["ssl"]
        options = _kept(pool.connection_kwargs)
        encrypted = issubclass(pool.connection_class, SentinelManagedSSLConnection)
    client: Redis = NewestMaster(addresses, sentinel_kwargs=own).master_for(
        service,
        db=int(database or 0),
        ssl=encrypted,
        decode_responses=False,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        retry_on_error=[],
        socket_timeout=PLAIN_TIMEOUT,
        **options,
    )
    return client


def _kept(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in _DECIDED_HERE and value is not None and name != "ssl"}


def is_sentinel_client(client: object) -> bool:
    """Made by ``Sentinel.master_for``."""
    return isinstance(getattr(client, "connection_pool", None), SentinelConnectionPool)


class NewestMaster(Sentinel):
    """Asks all Sentinels at once and believes the newest failover: one that was cut off, or has just come back, still names the
    old master. What it has once learned it does not unlearn."""

    def __init__(self, sentinels: Sequence[Address], sentinel_kwargs: Mapping[str, Any]) -> None:
        super().__init__(sentinels, sentinel_kwargs=sentinel_kwargs)  # type: ignore[no-untyped-call]  # redis-py's has no annotations
        self._newest: dict[str, int] = {}

    async def discover_master(self, service_name: str) -> Address:
        """Address of the master of the newest configuration; ``MasterNotFoundError`` while no Sentinel can say."""
        asked = [asyncio.ensure_future(sentinel.sentinel_masters()) for sentinel in self.sentinels]
        try:
            answers = await asyncio.gather(*asked, return_exceptions=True)
        finally:
            for each in asked:
                each.cancel()
        newest = self._newest.get(service_name, 0)
        answer: Any
        found: Address | None = None
        said: list[str] = []
        for answer in answers:
            if isinstance(answer, RedisError | OSError):
                said.append(repr(answer))
            elif isinstance(answer, BaseException):
                raise answer
            elif (state := answer.get(service_name)) is None:
                said.append(f"one watches {', '.join(map(repr, answer)) or 'nothing'}")
            elif int(state["config-epoch"]) >= newest:
                newest = int(state["config-epoch"])
                found = str(state["ip"]), int(state["port"])
            else:
                said.append(f"one is at configuration {state['config-epoch']}, {newest} was seen")
        if found is None:
            raise MasterNotFoundError(f"no Sentinel names the master of {service_name!r}: {'; '.join(said)}")
        self._newest[service_name] = newest
        return found


async def close_client(client: Any) -> None:
    """Close a client that was made here, with all that it opened."""
    await client.aclose()
    if isinstance(client, RedisCluster):
        return
    await client.connection_pool.disconnect()
    if is_sentinel_client(client):
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            await sentinel.aclose()
