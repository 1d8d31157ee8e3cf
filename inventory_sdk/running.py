"""What one Inventory has open in one event loop: connections, engine, publisher, watermark, and the worker where it runs inside."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final

from inventory_sdk.beside import Beside, Ground
from inventory_sdk.errors import (
    DurabilityNotReached,
    InsufficientStock,
    InvalidOperation,
    InventoryError,
    OutcomeUnknown,
    StockFrozen,
)
from inventory_sdk.ledger.protocol import NEVER, REPARTITIONED, Ledger, LedgerUnavailable, OperationRow
from inventory_sdk.metrics import Happened, Metrics
from inventory_sdk.model import OpeningBalance, Position, Shortage, split_key
from inventory_sdk.redis_urls import close_client
from inventory_sdk.servers import Servers
from inventory_sdk.stock.batch import Answered, read_entries
from inventory_sdk.stock.decorators import Hooks
from inventory_sdk.stock.engine import Engine, StockSettings
from inventory_sdk.stock.entering import open_balances
from inventory_sdk.stock.later import Registry
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.wire import NotExecuted, ReplyLost
from inventory_sdk.sync.publish import Publisher
from inventory_sdk.sync.queues import from_url
from inventory_sdk.sync.queues.protocol import PublishFailed, Unroutable
from inventory_sdk.sync.recovery import open_first
from inventory_sdk.sync.watermark import Watermark
from inventory_sdk.sync.worker import Worker

log = logging.getLogger("inventory_sdk")

LEDGER_TIMEOUT: Final = 30.0
"""Seconds that ``durability="database"`` and ``settled()`` wait."""


class Running:
    """One event loop's half of an Inventory. ``open`` is False while the ledger has no schema."""

    def __init__(
        self,
        servers: Servers,
        ledger: Ledger,
        settings: StockSettings,
        metrics: Metrics,
        hooks: Hooks,
        later: Registry,
        beside: Sequence[Beside] = (),
    ) -> None:
        self._servers = servers
        self._beside = tuple(beside)
        self._begun: list[Beside] = []
        self._hooks = hooks
        self._later = later
        self._metrics = metrics
        self.ledger = ledger
        self.settings = settings
        self.open = False
        self.failure: BaseException | None = None
        self.client = servers.make_client()
        self.queue = from_url(
            servers.queue,
            settings.namespace,
            client_factory=lambda: self.engine.wire.client,
            partitions=settings.partitions,
            metrics=metrics,
        )
        self._publisher = Publisher(self.queue, metrics)
        self.engine = Engine(
            self.client,
            ledger,
            settings,
            metrics,
            self._publisher.publish if self.queue.confirms else None,
            self._open_balances if hooks.reads_stock is not None else None,
            self._refused,
            hooks.writes_stock,
        )
        self.watermark = Watermark(ledger, self.engine.upkeep.worker_seen)
        self._verdicts: dict[Position, asyncio.Task[list[OperationRow]]] = {}
        self._worker: Worker | None = None
        self.ground = Ground(
            namespace=settings.namespace,
            client=self.client,
            ledger=ledger,
            engine=self.engine,
            queue=self.queue,
            watermark=self.watermark,
            metrics=metrics,
            tell=self._hooks.tell,
            failed=self._failed,
            embedded=servers.embedded,
        )

    @property
    def default_durability(self) -> str:
        """``queue`` where one confirms, else ``redis``."""
        return "queue" if self.queue.confirms else "redis"

    async def start(self) -> None:
        """Connect; open the stock if the ledger has its schema (an embedded one is made)."""
        await self.ledger.start()
        await self.queue.start()
        if self._servers.embedded:
            await self.ledger.create_schema()
        for each in self._beside:
            self._begun.append(each)
            await each.start(self.ground)
        if await self.ledger.check_schema():
            log.warning("the ledger has no (complete) schema yet: await inventory.create_schema(), or inventory-sdk schema")
            return
        await self.open_stock()

    async def open_stock(self) -> None:
        """Hold our settings against the ledger's, and make the first epoch of each partition where there is none."""
        if self.open:
            return
        for name, value in (("partitions", str(self.settings.partitions)), ("partition_by", self.settings.partition_by)):
            stored = await self.ledger.settle_setting(name, value)
            if stored != value:
                raise InventoryError(
                    f"{name}={value!r}, but this ledger was made with {stored!r}, and all processes must agree: "
                    f"set {name}={stored!r} here, or change it everywhere with inventory-sdk repartition"
                )
        self.engine.relaid = int((await self.ledger.settle_setting(REPARTITIONED, NEVER)).split()[-1])
        for partition in range(self.settings.partitions):
            try:
                await open_first(self.engine.upkeep, self.ledger, self.queue, partition)
            except StockFrozen as frozen:
                # Whoever was opening or recovering it may be dead. A worker that did not start could never take that over.
                log.warning("started all the same: %s", frozen)
        self.open = True
        if self._servers.embedded:
            await self.embed_worker()

    @property
    def embedded_worker(self) -> Worker | None:
        """The worker that runs inside; None where it runs elsewhere."""
        return self._worker

    async def embed_worker(self) -> None:
        """Start a worker inside; ``close`` stops it."""
        self._worker = self.make_worker()
        await self._worker.start()

    async def keeps(self, level: str) -> None:
        """``InvalidOperation`` where this deployment can't keep the level. Embedded, for tests, each is as good as the others."""
        if self._servers.embedded:
            return
        if level == "queue" and not self.queue.confirms:
            raise InvalidOperation("durability", level, "needs a queue that confirms: Inventory(queue='amqp://…')")
        if level in ("replica", "aof"):
            await self.engine.waits.check(self.engine.partitions[0], level)

    def make_worker(self, **options: Any) -> Worker:
        """A worker over all partitions, on this loop's connections."""
        self._later.check()
        return Worker(
            self.engine.upkeep,
            self.ledger,
            self.queue,
            partitions=range(self.settings.partitions),
            metrics=self._metrics,
            writes_stock=self._hooks.writes_stock,
            on_event=self._hooks.tell,
            on_failure=self._failed,
            tasks=self._later if len(self._later) else None,
            on_entries=tuple(self.ground.applied),
            jobs=[job for each in self._beside for job in each.jobs(self.ground)],
            **options,
        )

    async def close(self) -> None:
        """Everything that was opened, in the order in which it is no longer needed; the first error is raised at the end."""
        failures: list[BaseException] = []
        steps = [self.engine.drain, self._publisher.close, self.watermark.close]
        if self._worker is not None:
            steps.append(self._worker.stop)
        steps += [each.close for each in reversed(self._begun)]
        for step in (*steps, self.engine.close, self.queue.close, self.ledger.close, self._close_client):
            try:
                await step()
            except Exception as error:
                log.exception("closing %s failed", step.__qualname__)
                failures.append(error)
        if failures:
            raise failures[0]

    async def _close_client(self) -> None:
        await close_client(self.client)

    async def reach(self, position: Position, level: str, key: str, batch: Answered | None) -> OperationRow | None:
        """Until the operation is as durable as ``level`` says. A row is answered where the ledger found that an earlier
        operation of this id stands: the first receipt. ``DurabilityNotReached``; ``InsufficientStock`` if the ledger refused it."""
        if position.epoch == 0:  # it entered through the ledger
            return None
        name = split_key(key)[1] if key else None
        if level == "queue":
            await self._confirmed(position, key, batch)
        elif level in ("replica", "aof"):
            await self._copied(position, level, key, batch)
        else:
            await self._applied(position, "database", name)
        if level != "database":
            return None
        try:
            return await self._verdict(position, key)
        except LedgerUnavailable as error:
            why = f"applied, but its verdict is not known: {error}"
            raise DurabilityNotReached(level, position, position, None, why, name) from error

    async def _applied(self, position: Position, level: str, name: str | None, why: str = "") -> None:
        try:
            await self.watermark.reached(position, LEDGER_TIMEOUT)
        except DurabilityNotReached as error:
            lost = error.why.startswith("lost")  # then nothing stands that could be repeated for its level
            why = "; ".join(filter(None, (why, error.why)))
            raise DurabilityNotReached(level, position, error.applied, error.worker_seen, why, None if lost else name) from error

    async def _copied(self, position: Position, level: str, key: str, batch: Answered | None) -> None:
        """The batch's own wait where it wrote the operation; else (a replay) one behind something harmless."""
        if self._servers.embedded:
            return  # for tests: everything is in one process, and no level survives more than another
        if batch is not None and batch.waited is not None and batch.waited_for == level and batch.position == position:
            why = await asyncio.shield(batch.waited)
        else:
            why = await self.engine.waits.marked(self.engine.partitions[position.partition], level, key, position)
        if why:
            raise DurabilityNotReached(level, position, None, None, why, split_key(key)[1])

    async def _confirmed(self, position: Position, key: str, batch: Answered | None) -> None:
        """Its entry, and those that gave back what it sells. What the journal does not have (any more) the ledger must have."""
        name = split_key(key)[1] if key else None
        if batch is not None and batch.givers and batch.given is None:
            batch.given = self.engine.in_background(self._given(batch), "confirm of givers")
        publication = batch.confirmed if batch is not None and batch.position == position else None
        replay = publication is None
        try:
            # A replay earns its level again. Nothing is let in for an epoch that has ended.
            if publication is None and (batch is None or batch.position.epoch == position.epoch):
                view = self.engine.partitions[position.partition]
                for _, body in await read_entries(view, position.epoch, position.sequence - 1, position.sequence, 1):
                    publication = self._publisher.publish(*position, body.decode())
            if publication is not None:
                await publication
        except Unroutable as error:
            await self._refused_by_the_fence(position, name, replay, error)
            return
        except (PublishFailed, NotExecuted) as error:
            raise DurabilityNotReached("queue", position, None, None, str(error), name) from error
        if publication is None:
            await self._recorded(position, key)
        elif batch is not None and batch.givers is None:
            await self._applied(position, "queue", name, "the answer that says what it rests on was lost")
        if batch is not None and batch.given is not None:
            failed = await asyncio.shield(batch.given)
            if failed is not None:
                why = f"what gave back its stock is not safe: {failed}"
                raise DurabilityNotReached("queue", position, None, None, why, name) from failed

    async def _recorded(self, position: Position, key: str) -> None:
        """Trimmed is applied. But a Redis that lost the entry, or never had it, has none either: the ledger must have this very one."""
        name = split_key(key)[1]
        gone = "its entry is not in the journal"
        await self._applied(position, "queue", name, gone)
        try:
            rows = await self.ledger.operations_at([position])
        except LedgerUnavailable as error:
            raise DurabilityNotReached("queue", position, None, None, f"{gone}, and the ledger can't be asked: {error}", name) from error
        if not any(row.key == key for row in rows):
            raise DurabilityNotReached("queue", position, None, None, f"{gone}, and the ledger has another one there")

    async def _refused_by_the_fence(self, position: Position, name: str | None, replay: bool, error: Unroutable) -> None:
        """RabbitMQ returned the entry: what that means depends on the epoch that Redis sells in now."""
        epoch = await self._open_epoch(position.partition)
        if replay and epoch is not None and epoch > position.epoch:
            return  # a replay across a recovery: what Redis remembers of an earlier epoch, it has from the ledger
        if epoch == position.epoch:
            # A broker that was emptied: the worker binds the epoch again and reads the entry from the journal.
            raise DurabilityNotReached("queue", position, None, None, f"{error}; it stands in Redis", name) from error
        why = f"epoch {position.epoch} of partition {position.partition} was ended before RabbitMQ confirmed it"
        raise OutcomeUnknown(name or "", why) from error

    async def _given(self, batch: Answered) -> Exception | None:
        """For all callers of a batch: None, or why what it rests on could not be made safe."""
        assert batch.givers is not None
        assert self.engine.givers is not None
        number, epoch, _ = batch.position
        try:
            upto = await self.engine.givers.confirm(self.engine.partitions[number], epoch, batch.givers)
            if upto:
                await self.watermark.reached(Position(number, epoch, upto), LEDGER_TIMEOUT)
        except (PublishFailed, InventoryError) as error:
            return error
        return None

    async def _open_epoch(self, partition: int) -> int | None:
        """The epoch that Redis sells in now; None while it doesn't, or does not answer."""
        try:
            hello = await self.engine.partitions[partition].hello()
        except (NotExecuted, ReplyLost):
            return None
        return hello.epoch if hello.state == "open" and hello.run_id_kept else None

    async def _verdict(self, position: Position, key: str) -> OperationRow | None:
        task = self._verdicts.get(position)
        if task is None:
            task = asyncio.create_task(self.ledger.operations_at([position]), name="inventory verdicts")
            self._verdicts[position] = task
            task.add_done_callback(lambda _: self._verdicts.pop(position, None))
        row = next((row for row in await asyncio.shield(task) if row.key == key), None)
        if row is None:
            raise DurabilityNotReached("database", position, None, None, "the ledger has another entry at its position")
        if row.status in ("applied", "undone"):
            return None
        first = await self.ledger.operation(key)
        if row.status == "duplicate" and first is not None:
            return first
        raise InsufficientStock(
            [Shortage(*split_key(field), quantity, 0) for field, quantity in zip(row.lines[::2], row.lines[1::2], strict=True)]
        )

    async def _open_balances(self, engine: Engine, partition: Partition, fields: Sequence[str]) -> None:
        reads = self._hooks.reads_stock
        assert reads is not None

        async def read(merchant: str, skus: Sequence[str]) -> Sequence[OpeningBalance]:
            from sqlalchemy.ext.asyncio import AsyncSession

            ledger: Any = self.ledger
            async with AsyncSession(ledger.engine) as session:
                return list(await reads(merchant, skus, session))

        await open_balances(engine, partition, fields, read)

    def _refused(self, partition: int, status: str) -> None:
        # The worker finds the cause by itself; here it is only counted.
        self._metrics.record(Happened("refused", {"partition": str(partition), "status": status}))

    def _failed(self, error: BaseException) -> None:
        self.failure = error
