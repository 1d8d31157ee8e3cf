"""The ways from the process that journaled an entry to the worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.sync.queues.protocol import Queue

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster

    from inventory_sdk.metrics.events import Metrics


def from_url(
    url: str | None,
    namespace: str,
    *,
    client_factory: Callable[[], Redis | RedisCluster] | None = None,
    partitions: int = 1,
    metrics: Metrics | None = None,
) -> Queue:
    """The queue that the URL names: ``amqp://``, ``amqps://``, ``memory://``; None: the journal in Redis, read through
    ``client_factory`` (the running event loop's client). ``InvalidOperation`` for anything else. Connects to nothing."""
    if url is None:
        if client_factory is None:
            raise InvalidOperation("queue", None, "without a URL the journal itself is the queue, and a Redis client is needed")
        from inventory_sdk.sync.queues.stream import StreamQueue

        return StreamQueue(client_factory, namespace, metrics)
    scheme = urlsplit(url).scheme
    if scheme in ("amqp", "amqps"):
        from inventory_sdk.sync.queues.amqp import AmqpQueue

        return AmqpQueue(url, namespace, partitions=partitions, metrics=metrics)
    if scheme == "memory":
        from inventory_sdk.sync.queues.memory import MemoryQueue

        return MemoryQueue()
    # Not the URL: it may carry a password.
    raise InvalidOperation("queue", f"{scheme}://", "must begin with amqp://, amqps:// or memory://, or be None")
