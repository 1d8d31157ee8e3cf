"""Several partitions and several processes on one fakeredis and one SQLite ledger; a process can be killed at any of its script
calls, before Redis has seen it or after it was executed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import fakeredis
from redis.asyncio import Redis

from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.model import Layout, Line, Position, key_of
from inventory_sdk.stock.batch import Answered
from inventory_sdk.stock.engine import Engine, StockSettings
from inventory_sdk.stock.journal import decode
from inventory_sdk.stock.parts import call_of
from inventory_sdk.stock.stock import Stock
from inventory_sdk.sync.housekeeping import Housekeeping
from inventory_sdk.sync.parts import Parts
from inventory_sdk.sync.queues.memory import MemoryQueue
from inventory_sdk.sync.recovery import open_first

HOME = "m1"


def shops(partitions: int, count: int = 3) -> list[str]:
    """``HOME`` and merchants whose sku ``a`` stands in a partition of its own, however stock is told apart."""
    found: list[str] = []
    layouts = Layout(partitions), Layout(partitions, "sku")
    used = {layout: set[int]() for layout in layouts}
    for name in (HOME, *(f"s{number}" for number in range(1000))):
        places = {layout: layout.of(key_of(name, "a")) for layout in layouts}
        if len(found) < count and not any(places[layout] in used[layout] for layout in layouts):
            found.append(name)
            for layout in layouts:
                used[layout].add(places[layout])
    assert len(found) == count
    return found


def cart(*merchants: str, quantity: int = 1) -> list[Line]:
    return [Line("a", quantity, merchant) for merchant in merchants]


@dataclass
class Death:
    """The process dies at this script call (counted from 1), before Redis sees it or after it was executed."""

    at: int
    when: Literal["before", "after"]
    calls: int = 0
    dead: asyncio.Event = field(default_factory=asyncio.Event)


class Process:
    """One process: Engine and Stock. ``levels`` notes for each wait what had to be reached, in order."""

    def __init__(self, world: World, merchant: str = HOME) -> None:
        self.world = world
        self.client: Redis = fakeredis.FakeAsyncRedis(server=world.server, protocol=2)
        self.engine = Engine(self.client, world.ledger, world.settings, NoMetrics(), None, None, lambda *_: None)
        self.engine.relaid = world.relaid
        self.reached: list[tuple[int, str, str]] = []
        self.on_reach: Callable[[int, str, str], Any] | None = None
        self.stock = Stock(lambda: self.engine, merchant=merchant, durability=lambda: "redis", reach=self._reach)
        self.death: Death | None = None
        self.on_call: Callable[[str, Sequence[Any]], Any] | None = None
        """May raise, or answer an awaitable that is awaited, before each script call."""
        self._run = self.engine.wire.run
        self.engine.wire.run = self._wire  # type: ignore[method-assign]

    async def _wire(self, name: str, keys: Sequence[str], arguments: Sequence[Any], *behind: Any) -> Any:
        death = self.death
        if self.on_call is not None:
            waiting = self.on_call(name, arguments)
            if waiting is not None:
                await waiting
        if death is None:
            return await self._run(name, keys, arguments, *behind)
        death.calls += 1
        if death.calls < death.at:
            return await self._run(name, keys, arguments, *behind)
        if death.calls == death.at and death.when == "after":
            await self._run(name, keys, arguments, *behind)
        death.dead.set()
        return await asyncio.Event().wait()

    async def _reach(self, engine: Engine, position: Position, level: str, key: str, batch: Answered | None) -> None:
        self.reached.append((position.partition, level, key))
        if self.on_reach is not None:
            waiting = self.on_reach(position.partition, level, key)
            if waiting is not None:
                await waiting
        if level in ("database", "settled"):
            await self.world.apply()

    async def killed_in(self, call: Any) -> bool:
        """Run the call until it ends or the process dies; True if it died. Of a dead process nothing runs any more."""
        assert self.death is not None
        task = asyncio.ensure_future(call)
        dying = asyncio.ensure_future(self.death.dead.wait())
        await asyncio.wait([task, dying], return_when=asyncio.FIRST_COMPLETED)
        if not self.death.dead.is_set():
            # What goes on behind the answered caller may die as well.
            while (background := set(self.engine._background)) and not self.death.dead.is_set():
                await asyncio.wait([*background, dying], return_when=asyncio.FIRST_COMPLETED)
        died = self.death.dead.is_set()
        dying.cancel()
        if died:
            self.death.at = 0
            await self.stop(task)
        await asyncio.gather(task, dying, return_exceptions=True)
        return died

    async def stop(self, *more: asyncio.Future[Any]) -> None:
        """Nothing of this process runs any more."""
        while True:
            batches = [batcher._task for batcher in self.engine._batchers.values() if batcher._task is not None]
            left = [each for each in (*more, *self.engine._background, *batches) if not each.done()]
            if not left:
                return
            for each in left:
                each.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def quiet(self) -> None:
        """What goes on behind the callers has ended."""
        await self.engine.drain()

    async def level(self, merchant: str, sku: str = "a") -> tuple[int, int]:
        found = await self.stock.level(sku, merchant=merchant)
        return found.available, found.reserved


@dataclass
class World:
    """What outlives the processes."""

    settings: StockSettings
    ledger: SqlLedger
    server: fakeredis.FakeServer = field(default_factory=fakeredis.FakeServer)
    processes: list[Process] = field(default_factory=list)
    relaid: int = 0
    _applying: asyncio.Lock = field(default_factory=asyncio.Lock)

    def process(self, merchant: str = HOME) -> Process:
        """Another process on the same stock."""
        made = Process(self, merchant)
        self.processes.append(made)
        return made

    def home(self, operation_id: str, merchant: str = HOME) -> int:
        """The partition that decides on it."""
        return self.processes[0].engine.layout.home(key_of(merchant, operation_id))

    def place(self, merchant: str, sku: str = "a") -> int:
        """The partition of its stock."""
        return self.processes[0].engine.layout.of(key_of(merchant, sku))

    def positions(self, operation_id: str, *merchants: str) -> list[int]:
        """Where a call of ``HOME`` with sku ``a`` of these has its positions: home, then its parts."""
        home = self.home(operation_id)
        return [home, *sorted({self.place(merchant) for merchant in merchants} - {home})]

    async def apply(self) -> None:
        """A worker's turn: the ledger applies all journals, partition after partition."""
        async with self._applying:
            upkeep = self.processes[0].engine.upkeep
            for partition in range(self.settings.partitions):
                row = await self.ledger.partition(partition)
                assert row is not None
                while rows := await upkeep.read_journal(partition, row.epoch, row.applied, None, 1000):
                    applied = await self.ledger.apply(
                        partition, row.epoch, [decode(partition, row.epoch, sequence, body) for sequence, body in rows]
                    )
                    assert not applied.refusals, applied.refusals
                    row = await self.ledger.partition(partition)
                    assert row is not None

    async def open_parts(self) -> list[tuple[int, str]]:
        """(partition, key) of every part that is still pinned."""
        client: Any = self.processes[0].client
        found = []
        for partition in range(self.settings.partitions):
            view = self.processes[0].engine.partitions[partition]
            for key, record in (await client.hgetall(view.key("reservations"))).items():
                if record.startswith(b"p") and call_of(key.decode()) is not None:
                    found.append((partition, key.decode()))
        return found

    async def resolve(self) -> None:
        """All parts are overdue, and a worker finds them."""
        rescuer = self.process()
        parts = Parts(rescuer.engine.upkeep, self.ledger, MemoryQueue(), NoMetrics(), lambda *_: None, asyncio.Event())
        client: Any = rescuer.client
        for _ in range(4):
            await self.apply()
            left = await self.open_parts()
            for partition, key in left:
                await client.zadd(rescuer.engine.partitions[partition].key("expiry"), {key: 1}, xx=True)
            for partition in {partition for partition, _ in left}:
                await Housekeeping(parts, partition).expire()
        await self.apply()

    async def check(self) -> dict[str, int]:
        """Redis is what the ledger says, the ledger adds up; available per "merchant/sku"."""
        await self.apply()
        assert await self.ledger.verify() == []
        found: dict[str, int] = {}
        process = self.processes[0]
        for row in await self.ledger.all_stock():
            level = await process.stock.level(row.sku, merchant=row.merchant)
            assert (level.available, level.reserved) == (row.available, row.reserved), (row, level)
            found[f"{row.merchant}/{row.sku}"] = row.available
        return found

    async def row(self, merchant: str, sku: str = "a") -> Any:
        (row,) = await self.ledger.stock([key_of(merchant, sku)])
        return row


@asynccontextmanager
async def world_of(
    folder: Path | str, namespace: str, *, partitions: int = 4, partition_by: str = "merchant", stocked: dict[str, int] | None = None
) -> AsyncIterator[World]:
    """An open stock, its ledger in this folder or at this URL; ``stocked``: units of sku ``a`` per merchant."""
    database = folder if isinstance(folder, str) else f"sqlite+aiosqlite:///{folder / 'ledger.db'}"
    ledger = SqlLedger(database, "inventory_" if isinstance(folder, Path) else f"{namespace}_")
    await ledger.create_schema()
    world = World(StockSettings(namespace=namespace, partitions=partitions, partition_by=partition_by), ledger)
    first = world.process()
    queue = MemoryQueue()
    try:
        for partition in range(partitions):
            await open_first(first.engine.upkeep, ledger, queue, partition)
        for merchant, units in (stocked or {}).items():
            await first.stock.restock([Line("a", units)], merchant=merchant, operation_id="first")
        await world.apply()
        yield world
    finally:
        for process in world.processes:
            await process.stop()
            await process.engine.close()
            await process.client.aclose()
        await ledger.close()
