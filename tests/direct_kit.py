"""The shop of the stock tests on stock that the database sells: the same API, the ledger on a real database, Redis only beside it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import fakeredis
from sqlalchemy import insert, select, update

from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.model import key_of
from inventory_sdk.stock.engine import Engine, StockSettings
from inventory_sdk.stock.stock import Stock
from inventory_sdk.sync.housekeeping import ending
from tests.stock_kit import MERCHANT, FakeLedger, Recorded, Shop, reached


class StockedLedger(SqlLedger):
    """A ledger whose rows are made by the test, as ``FakeLedger``'s are."""

    def stocked(self, merchant: str = MERCHANT, **available: int) -> None:
        """Rows that the database sells. From a thread, since the tests call it as they call ``FakeLedger``'s."""
        rows = [
            {"merchant": merchant, "sku": sku, "partition": 0, "available": units, "supplied": units, "admission": "database"}
            for sku, units in available.items()
        ]
        if not rows:
            return

        async def write() -> None:
            async with self.engine.begin() as connection:
                await connection.execute(insert(self.tables.stock), rows)
                known = select(self.tables.admission.c.merchant).where(self.tables.admission.c.merchant == merchant)
                if (await connection.execute(known)).first() is None:
                    home = {"merchant": merchant, "partition": 0, "admission": "database", "changed_ms": 0}
                    await connection.execute(insert(self.tables.admission), [home])
            await self.close()

        thread = threading.Thread(target=lambda: asyncio.run(write()))
        thread.start()
        thread.join()


@dataclass
class DirectShop(Shop):
    """What ``Shop`` reads from Redis, read from the ledger."""

    @property
    def truth(self) -> StockedLedger:
        return cast("StockedLedger", self.ledger)

    async def snapshot(self, *, without: Sequence[str] = ()) -> dict[str, Any]:
        tables = self.truth.tables
        found: dict[str, Any] = {}
        async with self.truth.engine.connect() as connection:
            for table in (tables.stock, tables.entry, tables.operation, tables.change, tables.reservation, tables.reservation_line):
                query = select(table).order_by(*table.primary_key.columns)
                found[table.name] = [tuple(row) for row in await connection.execute(query)]
        return found

    async def make_due(self, reservation: str, merchant: str = MERCHANT) -> str:
        key, table = key_of(merchant, reservation), self.truth.tables.reservation
        async with self.truth.engine.begin() as connection:
            due = update(table).where(table.c.key == key, table.c.state == "held", table.c.expires_at > 0).values(expires_at=1)
            assert (await connection.execute(due)).rowcount == 1
        return key

    async def expire(self, *reservations: str) -> None:
        keys = {await self.make_due(name) for name in reservations}
        due = await self.truth.due_holds(0, 100, 60_000)
        assert {row.key for row in due} >= keys
        for row in due:
            assert (await self.truth.act(0, ending(row, ""))).code == "done"


@asynccontextmanager
async def direct_shop(database: str, namespace: str, stocked: Mapping[str, int], **settings: Any) -> AsyncIterator[DirectShop]:
    """Open, with these SKUs; its tables are dropped afterwards."""
    ledger = StockedLedger(database, prefix=f"{namespace}_", admission="database")
    await ledger.start()
    await ledger.create_schema()
    client = fakeredis.FakeAsyncRedis(protocol=2)
    chosen = StockSettings(namespace=namespace, admission="database", **settings)
    metrics, refusals = Recorded(), list[tuple[int, str]]()
    engine = Engine(client, ledger, chosen, metrics, None, None, lambda *why: refusals.append(why))
    stock = Stock(lambda: engine, merchant=MERCHANT, durability=lambda: "redis", reach=reached)
    try:
        for number in range(chosen.partitions):
            raised = await ledger.raise_epoch(number, 0)
            assert raised is not None
            await engine.upkeep.freeze(number, raised.epoch)
            async with ledger.rebuilding(number, raised.epoch) as rebuilding:
                await engine.upkeep.rebuild(number, raised.epoch, rebuilding)
        ledger.stocked(**stocked)
        yield DirectShop(client, chosen, cast("FakeLedger", ledger), metrics, engine, stock, refusals)
    finally:
        await engine.close()
        async with ledger.engine.begin() as connection:
            await connection.run_sync(ledger.tables.metadata.drop_all)
        await ledger.close()
        await client.aclose()
