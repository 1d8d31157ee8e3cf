"""What lives beside the stock: controllers with a life of their own in each event loop (hotspots, gray links, …), and the ground they
stand on. They never move stock except through its public acts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from inventory_sdk.ledger.protocol import Ledger
from inventory_sdk.metrics import Metrics
from inventory_sdk.model import JournalEntry
from inventory_sdk.stock.engine import Engine
from inventory_sdk.sync.queues.protocol import Queue
from inventory_sdk.sync.watermark import Watermark

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster


@dataclass(frozen=True, slots=True)
class Ground:
    """What one event loop's half of an Inventory offers to those beside the stock.

    ``client`` is for plain commands (bytes, RESP2, nothing retried); keys begin with ``{namespace}:`` and the part's name.
    ``tell`` calls the service's ``on`` handlers. ``failed`` is for a background task that died: the Inventory raises it then.
    ``embedded``: everything is in this process, worker included. What is put into ``applied`` at the start hears of every journal
    entry that a worker of this event loop has applied, at once and between two transactions: it must neither wait nor raise.
    """

    namespace: str
    client: Redis | RedisCluster
    ledger: Ledger
    engine: Engine
    queue: Queue
    watermark: Watermark
    metrics: Metrics
    tell: Callable[[str, Mapping[str, Any]], Awaitable[None]]
    failed: Callable[[BaseException], None]
    embedded: bool
    applied: list[Callable[[Sequence[JournalEntry]], None]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Job:
    """Work that one of many workers' processes does for a part, beside the journal. ``run`` gets the event that is set when the
    worker stops, and returns soon after; what it raises is the worker's failure."""

    name: str
    run: Callable[[asyncio.Event], Coroutine[Any, Any, None]]


class Beside(Protocol):
    """One controller. Its state belongs to the event loop it was started in."""

    async def start(self, ground: Ground) -> None:
        """Begin in this event loop, once the connections are there; the ledger may have no schema yet. Does not wait for a server that
        is away."""
        ...

    async def close(self) -> None:
        """End what ``start`` began in this event loop."""
        ...

    def jobs(self, ground: Ground) -> Sequence[Job]:
        """What a worker of this event loop runs for it."""
        ...
