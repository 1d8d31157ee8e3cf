"""Stock in one event loop: partitions, batches, loads, and what happens to an operation whose caller went away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from redis.asyncio import Redis, RedisCluster

from inventory_sdk import context
from inventory_sdk.errors import Overloaded
from inventory_sdk.ledger.protocol import Ledger, WritesStock
from inventory_sdk.metrics.events import Happened, Metrics
from inventory_sdk.model import JournalOperation, partition_of, split_key
from inventory_sdk.stock.batch import NOT_LOADED, PIN, Answer, Batcher, Publish, read_entries
from inventory_sdk.stock.givers import Givers
from inventory_sdk.stock.journal import decode
from inventory_sdk.stock.loading import Loader
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.routed import scripts_on
from inventory_sdk.stock.upkeep import Upkeep
from inventory_sdk.stock.waits import Waits

log = logging.getLogger("inventory_sdk.stock")

PIN_WAITS: Final = (0.01, 0.05, 0.1, 0.2, 0.4)
"""Seconds between looks at a hold that its decider has pinned: a commit takes milliseconds."""


@dataclass(frozen=True, slots=True)
class StockSettings:
    """What all processes on one stock share, and how this one talks to Redis. Times in seconds; ``journal_cap`` in entries of one
    partition (0: none), at which takes are refused. ``replicas``: how many must have what is acknowledged at ``replica``;
    ``wait_timeout``: how long it and ``aof`` are waited for."""

    namespace: str = "inventory"
    partitions: int = 1
    redis_timeout: float = 2.0
    journal_cap: int = 1_000_000
    results_window: float = 86_400.0
    results_most: int = 20_000_000
    replicas: int = 1
    wait_timeout: float = 5.0


class Engine:
    """Everything of the stock room that belongs to one event loop."""

    def __init__(
        self,
        client: Redis | RedisCluster,
        ledger: Ledger,
        settings: StockSettings,
        metrics: Metrics,
        publish: Publish | None,
        opener: Callable[[Engine, Partition, Sequence[str]], Awaitable[None]] | None,
        on_refused: Callable[[int, str], None],
        writes_stock: Sequence[WritesStock] = (),
    ) -> None:
        self.writes_stock = writes_stock
        self.ledger = ledger
        self.settings = settings
        self.metrics = metrics
        self.publish = publish
        self.wire = scripts_on(client, settings.redis_timeout, metrics)
        self.partitions = tuple(Partition(number, settings.namespace, self.wire) for number in range(settings.partitions))
        self._batchers: dict[tuple[int, str], Batcher] = {}
        self._on_refused = on_refused
        self.kept = {"redis"}
        """Durability levels that are known to be kept here."""
        self.waits = Waits(settings.replicas, settings.wait_timeout, self.in_background)
        self.givers = Givers(publish, self.in_background, metrics) if publish is not None else None
        self._background: set[asyncio.Task[Any]] = set()
        self.loader = Loader(ledger, partial(opener, self) if opener is not None else None)
        self.upkeep = Upkeep(
            self.partitions.__getitem__,
            self._submit_upkeep,
            self.loader.load,
            settings.results_window,
            settings.results_most,
            # Half of the cap: what is applied must never be what fills the journal.
            settings.journal_cap // 2,
        )

    def home(self, merchant: str) -> Partition:
        """The partition of a merchant."""
        return self.partitions[partition_of(merchant, len(self.partitions))]

    def batcher(self, partition: Partition, lane: str) -> Batcher:
        """The lane's batcher, made when first used."""
        key = (partition.number, lane)
        batcher = self._batchers.get(key)
        if batcher is None:
            batcher = Batcher(
                partition, lane, self.metrics, self.publish, self.settings.journal_cap, self._on_refused, self.waits, self.givers
            )
            self._batchers[key] = batcher
        return batcher

    async def send(self, partition: Partition, operation: list[Any]) -> Answer:
        """One operation's answer, its stock loaded first where it was not; waits a moment for a pinned hold's decider."""
        answer = await self.batcher(partition, context.lane.get()).submit(operation)
        code = answer[0][0]
        if code != NOT_LOADED and code != PIN:
            return answer
        return await self.send_again(partition, operation, answer, None)

    async def send_again(
        self, partition: Partition, operation: list[Any], answer: Answer, orphaned: Callable[[Answer], None] | None
    ) -> Answer:
        """What ``send`` does after an answer that something is not loaded, or pinned."""
        batcher = self.batcher(partition, context.lane.get())
        loads = 0
        waits = iter(PIN_WAITS)
        while True:
            code = answer[0][0]
            if code == NOT_LOADED:
                loads += 1
                if loads > 5:
                    raise Overloaded("the stock of this operation does not stay loaded; the partition is being recovered", 0.5)
                await self.loader.load(partition, answer[0][1:])
            elif code == PIN:
                pause = next(waits, None)
                if pause is None:
                    name = split_key(operation[5])[1]
                    raise Overloaded(f"reservation {name!r} is pinned by a transaction that has not ended", retry_after=1.0)
                await asyncio.sleep(pause)
            else:
                return answer
            answer = await (batcher.submit(operation) if orphaned is None else batcher.ask(operation, orphaned))

    async def _submit_upkeep(self, partition: Partition, operation: list[Any]) -> Answer:
        return await self.batcher(partition, "upkeep").submit(operation)

    async def journaled(self, partition: Partition, key: str, epoch: int, sequence: int) -> JournalOperation | None:
        """The operation of this key at a journal position; None once the entry is trimmed."""
        entries = await read_entries(partition, epoch, sequence - 1, sequence, 1)
        if not entries:
            return None
        for operation in decode(partition.number, epoch, sequence, entries[0][1]).operations:
            if operation.key == key:
                return operation
        return None

    def in_background(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A task that outlives its caller; ``close`` waits for it, a failure is logged and counted."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background_done)
        return task

    def _background_done(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            log.error("%s failed: %s", task.get_name(), error, exc_info=error)
            self.metrics.record(Happened("background_failed", {"what": task.get_name()}))

    async def close(self) -> None:
        """Drains, then closes the connections: nobody may use them any more, the worker's upkeep neither."""
        await self.drain()
        await self.wire.close()

    async def drain(self) -> None:
        """Waits for batches, loads and undos under way."""
        while self._background:
            await asyncio.wait(set(self._background))
        await self.loader.close()
        for batcher in self._batchers.values():
            await batcher.close()
        while self._background:
            await asyncio.wait(set(self._background))
