"""Which Redis, queue and database an Inventory is on, and how a client is made from a URL or from an object of the user's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.redis_urls import CLUSTER_SCHEMES, SENTINEL_SCHEMES, check_places, cluster_client, is_sentinel_client, sentinel_client

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from inventory_sdk.ledger.protocol import Ledger

MEMORY: Final = "memory://"
CONNECT_TIMEOUT: Final = 2.0
PLAIN_TIMEOUT: Final = 10.0
"""For plain reads and the worker's blocking ones; scripts have a time-out of their own."""

_POOL_OWN: Final = frozenset(
    {
        "decode_responses",
        "himport_registry",
        "maint_notifications_config",
        "maint_notifications_pool_handler",
        "orig_host_address",
        "orig_socket_connect_timeout",
        "orig_socket_timeout",
        "protocol",
        "retry",
        "retry_on_error",
        "retry_on_timeout",
        "socket_timeout",
    }
)
"""What a pool adds to its connections' arguments, and what we decide ourselves."""


@dataclass(frozen=True, slots=True)
class Servers:
    """``redis``: a URL, a redis.asyncio client (fakeredis, RedisCluster and a Sentinel's too) or ``memory://``; ``embedded``: the
    worker runs inside."""

    redis: str | Redis | RedisCluster
    queue: str | None
    database: str | AsyncEngine | None
    embedded: bool

    def make_client(self) -> Redis | RedisCluster:
        """A client for the running event loop: bytes, RESP2, nothing retried (one retry of a lost ``DECRBY`` removes two)."""
        scheme = urlsplit(self.redis).scheme if isinstance(self.redis, str) else ""
        if isinstance(self.redis, RedisCluster) or scheme in CLUSTER_SCHEMES:
            return cluster_client(self.redis, CONNECT_TIMEOUT)
        if is_sentinel_client(self.redis) or scheme in SENTINEL_SCHEMES:
            return sentinel_client(self.redis, CONNECT_TIMEOUT)
        options: dict[str, Any] = {
            "decode_responses": False,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "retry_on_error": [],
            "socket_timeout": PLAIN_TIMEOUT,
        }
        if isinstance(self.redis, str):
            pool = ConnectionPool.from_url(self.redis, socket_connect_timeout=CONNECT_TIMEOUT, **options)
        else:
            given = self.redis.connection_pool
            kept = {name: value for name, value in given.connection_kwargs.items() if name not in _POOL_OWN}
            pool = ConnectionPool(connection_class=given.connection_class, **kept, **options)
        client = Redis(connection_pool=pool)
        client.auto_close_connection_pool = True
        return client

    def make_ledger(self, prefix: str, admission: str = "redis") -> Ledger:
        """The SQL ledger; ``ImportError`` names the extra that is missing."""
        try:
            from inventory_sdk.ledger.sql import SqlLedger
        except ImportError as error:
            raise ImportError(
                f"the ledger needs SQLAlchemy ({error}): pip install 'inventory_sdk[postgresql]', [mysql], [sqlite] or [embedded]"
            ) from error
        if self.database is None:
            raise InvalidOperation("database", None, "the ledger is the truth: give a SQL URL, or use memory:// for everything")
        return SqlLedger(self.database, prefix, admission)


def servers_for(
    redis: str | Redis | RedisCluster, queue: str | None, database: str | AsyncEngine | None, embedded: bool = False
) -> Servers:
    """What the arguments of an Inventory mean; ``memory://`` brings its own fakeredis and SQLite."""
    if isinstance(redis, str):
        scheme = urlsplit(redis).scheme
        if scheme == "memory":
            return Servers(_fake_redis(), queue, database or "sqlite+aiosqlite://", True)
        if scheme not in ("redis", "rediss", "unix", *CLUSTER_SCHEMES, *SENTINEL_SCHEMES):
            known = "redis://, rediss://, unix://, redis+cluster://, redis+sentinel:// or memory://"
            raise InvalidOperation("redis", f"{scheme}://", f"must begin with {known}")
        if scheme in (*CLUSTER_SCHEMES, *SENTINEL_SCHEMES):
            check_places(redis)
    elif not isinstance(redis, Redis | RedisCluster):
        raise InvalidOperation("redis", redis, "must be a URL or a redis.asyncio client")
    return Servers(redis, queue, database, embedded)


def _fake_redis() -> Redis:
    try:
        from fakeredis import FakeAsyncRedis
    except ImportError as error:
        raise ImportError(f"memory:// needs fakeredis ({error}): pip install 'inventory_sdk[embedded]'") from error
    client: Redis = FakeAsyncRedis()
    return client
