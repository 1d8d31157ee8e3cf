"""Drifts of every cause, made while four processes sell: each is found with its cause and nothing else is; corrected, the sides agree.

INVENTORY_TEST_DRIFTS (of each cause) and INVENTORY_TEST_CLEAN (comparisons that must raise no alarm) make it bigger;
INVENTORY_TEST_SEED replays the sellers.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select, update

from inventory_sdk import Inventory, Line
from inventory_sdk.errors import Overloaded
from inventory_sdk.model import key_of, partition_of, split_key
from inventory_sdk.reconcile.model import Cause
from tests.reconcile_process import make, own_table

pytestmark = [pytest.mark.redis, pytest.mark.postgresql]

DRIFTS = int(os.environ.get("INVENTORY_TEST_DRIFTS", "6"))
CLEAN = int(os.environ.get("INVENTORY_TEST_CLEAN", "4000"))
SELLERS = 4
PARTITIONS = 2
UNITS = 1000
SELLABLE = (Cause.MANUAL_REDIS, Cause.SERVICE_TABLE, Cause.WENT_BACK, Cause.EXPIRY_LOST)
"""Their SKUs are sold by all processes all the time. The others are quiet while the ledger's rows are cut out."""


def written(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def merchants() -> list[str]:
    names = [f"m{n}" for n in range(40)]
    return [next(name for name in names if partition_of(name, PARTITIONS) == partition) for partition in range(PARTITIONS)]


class Process:
    """One of ``tests.reconcile_process``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def said(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(120):
            line = await self.process.stdout.readline()
        assert line, "it ended without a word"
        return dict(json.loads(line))

    async def stop(self) -> dict[str, Any]:
        """Its last words."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        words = await self.said()
        while words["act"] not in ("counted", "ended"):
            words = await self.said()
        await asyncio.wait_for(self.process.wait(), 120)
        assert self.process.returncode == 0
        return words


@asynccontextmanager
async def running(what: str, settings: dict[str, Any], *more: str) -> AsyncIterator[Process]:
    command = [sys.executable, "-m", "tests.reconcile_process", what, json.dumps(settings), *more]
    pipe = asyncio.subprocess.PIPE
    process = Process(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=2**24))
    try:
        assert (await process.said())["act"] == "ready"
        yield process
    finally:
        if process.process.returncode is None:
            process.process.kill()
        await process.process.wait()


class Seeder:
    """Makes drifts. ``seeded``: what must be found, by what it is about."""

    def __init__(self, inventory: Inventory, table: Any) -> None:
        self.inventory = inventory
        self.table = table
        self.ledger: Any = inventory.ledger
        self.engine = inventory._running().engine
        self.seeded: dict[str, str] = {}

    def key(self, name: str, what: str) -> str:
        return self.engine.home(split_key(name)[0]).key(what)

    async def count(self, name: str, available: int = 0, reserved: int = 0) -> None:
        """Past every script, as a hand would."""
        client: Any = self.engine.wire.client
        if available:
            await client.hincrby(self.key(name, "available"), name, available)
        if reserved:
            await client.hincrby(self.key(name, "reserved"), name, reserved)

    async def acts(self, names: list[str], verb: str, prefix: str, **more: Any) -> list[Any]:
        return await asyncio.gather(*(self.act(name, verb, f"{prefix}-{at}", **more) for at, name in enumerate(names)))

    async def act(self, name: str, verb: str, operation_id: str, units: int = 1, **more: Any) -> Any:
        merchant, sku = split_key(name)
        while True:
            try:
                return await getattr(self.inventory.stock, verb)([Line(sku, units)], merchant=merchant, operation_id=operation_id, **more)
            except Overloaded as busy:
                await asyncio.sleep(busy.retry_after)

    async def manual_redis(self, names: list[str]) -> None:
        for at, name in enumerate(names):
            await self.count(name, available=(3, -2, 0, 5)[at % 4], reserved=(0, 0, 2, -1)[at % 4])
            self.seeded[f"stock {name}"] = Cause.MANUAL_REDIS

    async def service_table(self, names: list[str]) -> None:
        async with self.ledger.engine.begin() as connection:
            for at, name in enumerate(names):
                merchant, sku = split_key(name)
                mine = update(self.table).where(self.table.c.merchant == merchant, self.table.c.sku == sku)
                await connection.execute(mine.values(available=self.table.c.available + (4 if at % 2 else -4)))
                self.seeded[f"service {name}"] = Cause.SERVICE_TABLE

    async def expiry_lost(self, names: list[str]) -> None:
        client: Any = self.engine.wire.client
        await self.acts(names, "reserve", "lost", ttl=3600)
        for at, name in enumerate(names):
            hold = key_of(split_key(name)[0], f"lost-{at}")
            await client.zrem(self.key(name, "expiry"), hold)
            self.seeded[f"hold {hold}"] = Cause.EXPIRY_LOST

    async def went_back(self, names: list[str]) -> None:
        """An older copy of the keys comes back: counters without the last sales, and nobody remembers those."""
        client: Any = self.engine.wire.client
        await self.acts(names, "deduct", "back")
        await self.inventory.settled()
        for at, name in enumerate(names):
            await self.count(name, available=1)
            for window in ("results:0", "results:1"):
                await client.hdel(self.key(name, window), key_of(split_key(name)[0], f"back-{at}"))
            self.seeded[f"stock {name}"] = Cause.WENT_BACK

    async def missing_journal(self, names: list[str]) -> None:
        """The ledger's watermark stands behind entries that left nothing there, as after a restore of some of its tables."""
        receipts = await self.acts(names, "deduct", "missing")
        await self.inventory.settled()
        tables = self.ledger.tables
        positions = {receipt.positions[0] for receipt in receipts}
        async with self.ledger.engine.begin() as connection:
            for partition, epoch, seq in positions:
                for table in (tables.entry, tables.operation, tables.change):
                    await connection.execute(
                        delete(table).where(table.c.partition == partition, table.c.epoch == epoch, table.c.seq == seq)
                    )
            stock = tables.stock
            for name in names:
                merchant, sku = split_key(name)
                mine = (stock.c.merchant == merchant, stock.c.sku == sku)
                before = {"available": stock.c.available + 1, "sold": stock.c.sold - 1, "version": stock.c.version - 1}
                await connection.execute(update(stock).where(*mine).values(**before))
                own = update(self.table).where(self.table.c.merchant == merchant, self.table.c.sku == sku)
                await connection.execute(own.values(available=self.table.c.available + 1))
                self.seeded[f"stock {name}"] = Cause.MISSING_JOURNAL

    async def rejected(self, names: list[str]) -> None:
        """Redis sold what the ledger could not cover, and the void that takes it back was lost on its way."""
        tables = self.ledger.tables
        await self.acts(names, "adjust", "all", units=-UNITS)
        await self.inventory.settled()
        for name in names:
            await self.count(name, available=1)
        await self.acts(names, "deduct", "refused")
        await self.inventory.settled()
        async with asyncio.timeout(120):
            while True:
                async with self.ledger.engine.connect() as connection:
                    query = select(
                        tables.void.c.partition, tables.void.c.epoch, tables.void.c.seq, tables.void.c.index, tables.void.c.state
                    )
                    voids = list(await connection.execute(query))
                if len(voids) == len(names) and all(row.state == "made" for row in voids):
                    break
                await asyncio.sleep(0.05)
        async with self.ledger.engine.begin() as connection:
            operation = tables.operation
            await connection.execute(delete(operation).where(operation.c.kind == "void"))
        for name in names:
            # Without the void's unit, and without the one that had been put there by hand.
            await self.count(name, available=-2)
            self.seeded[f"stock {name}"] = Cause.REJECTED


@pytest.fixture
def settings(swept: str, redis_url: str, postgresql_url: str) -> dict[str, Any]:
    return {"redis": redis_url, "database": postgresql_url, "namespace": swept, "table_prefix": f"{swept}_", "partitions": PARTITIONS}


@pytest.fixture
async def table(settings: dict[str, Any]) -> AsyncIterator[Any]:
    inventory = make(settings)
    mine = own_table(settings["table_prefix"])
    ledger: Any = inventory.ledger
    async with ledger.engine.begin() as connection:
        await connection.run_sync(mine.metadata.create_all)
    await ledger.close()
    yield mine
    async with ledger.engine.begin() as connection:
        await connection.run_sync(mine.metadata.drop_all)
    await ledger.close()


async def test_every_drift_is_found_with_its_cause_while_four_processes_sell_and_nothing_else_is(
    settings: dict[str, Any], table: Any, tmp_path: Path
) -> None:
    seed = os.environ.get("INVENTORY_TEST_SEED", str(random.randrange(10**6)))
    print(f"INVENTORY_TEST_SEED={seed}")  # noqa: T201 - shown with a failure
    shops = merchants()
    drifting = {cause: [key_of(shops[n % 2], f"{cause}-{n}") for n in range(DRIFTS)] for cause in Cause if cause != Cause.LEDGER_BOOKS}
    clean = [key_of(shops[n % 2], f"clean-{n}") for n in range(max(300, CLEAN // 50))]
    everything = [*clean, *(name for names in drifting.values() for name in names)]
    sold = [*clean, *(name for cause in SELLABLE for name in drifting[cause])]
    inventory = make(settings)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(inventory)
        await inventory.create_schema()
        await stack.enter_async_context(running("work", settings))
        for shop in shops:
            mine = [split_key(name)[1] for name in everything if split_key(name)[0] == shop]
            ledger: Any = inventory.ledger
            async with ledger.engine.begin() as connection:
                await connection.execute(table.insert(), [{"merchant": shop, "sku": sku, "available": 0} for sku in mine])
            await inventory.stock.restock_many([Line(sku, UNITS) for sku in mine], merchant=shop, operation_id="po")
        stocked = written(tmp_path / "stocked.json", [list(split_key(name)) for name in sold])
        sellers = [await stack.enter_async_context(running("sell", settings, f"{seed}-{n}", stocked)) for n in range(SELLERS)]

        compared, runs, began = 0, 0, time.monotonic()
        while compared < CLEAN or runs < 3:
            # Everything now and then, and merchant by merchant: that leaves out the ledger's own books, which take a while.
            done = await inventory.reconciler.run(merchant=None if not runs % 10 else shops[runs % 2])
            assert done.open == (), f"a false alarm: {done.open[:3]}"
            assert (done.moving, done.unopened) == ((), ())
            compared, runs = compared + done.skus, runs + 1
        print(f"{compared} clean comparisons in {runs} runs, {time.monotonic() - began:.1f} s")  # noqa: T201 - the test's result

        seeder = Seeder(inventory, table)
        for cause, names in drifting.items():
            await getattr(seeder, cause.value)(names)
        began = time.monotonic()
        done = await inventory.reconciler.run()
        print(f"{len(seeder.seeded)} drifts were looked for in {time.monotonic() - began:.1f} s")  # noqa: T201 - as above
        found = {f"{each.what} {each.name}": each.cause for each in done.open if each.what != "books"}
        wrong = {name: (cause, found.get(name)) for name, cause in seeder.seeded.items() if found.get(name) != cause}
        assert not wrong, f"{len(wrong)} not as seeded: {list(wrong.items())[:5]}"
        assert found.keys() == seeder.seeded.keys()
        # The hole in the journal is a fact of the books, and stays one.
        assert {each.cause for each in done.open if each.what == "books"} <= {Cause.LEDGER_BOOKS}

        room = asyncio.Semaphore(4 + DRIFTS // 40)
        began = time.monotonic()

        async def correct(number: int) -> None:
            async with room:
                made = await inventory.reconciler.correct(number, "seeded by the test", "tester", confirmed=True)
                assert made.state == "corrected", made

        await asyncio.gather(*(correct(each.number) for each in done.open if each.what != "books"))
        print(f"corrected in {time.monotonic() - began:.1f} s")  # noqa: T201 - as above
        again = await inventory.reconciler.run()
        assert [each for each in again.open if each.what != "books"] == []

        counts = [await seller.stop() for seller in sellers]
        await expired(inventory)
        await recounted(inventory, counts, clean, everything)


async def expired(inventory: Inventory) -> None:
    """Until the sellers' short holds have run out, and the ledger knows."""
    engine = inventory._running().engine
    client: Any = engine.wire.client
    async with asyncio.timeout(60):
        for partition in engine.partitions:
            while await client.zcount(partition.key("expiry"), 1, (await partition.hello()).now_ms + 10_000):
                await asyncio.sleep(0.05)
    await inventory.settled()


async def recounted(inventory: Inventory, counts: list[dict[str, Any]], clean: list[str], everything: list[str]) -> None:
    """Redis = ledger for every SKU; for those that nobody has touched by hand, = what the sellers were told."""
    sums = {kind: sum((Counter(each[kind]) for each in counts), Counter[str]()) for kind in ("sold", "supplied", "written_off")}
    rows = {key_of(row.merchant, row.sku): row for row in await inventory.ledger.all_stock()}
    for name in everything:
        row = rows[name]
        merchant, sku = split_key(name)
        level = await inventory.stock.level(sku, merchant=merchant)
        assert (level.available, level.reserved) == (row.available, row.reserved), name
        if name in clean:
            mine = (UNITS + sums["supplied"][name], sums["sold"][name], sums["written_off"][name])
            assert (row.supplied, row.sold, row.written_off) == mine, name
    assert sum(sum(each.values()) for each in sums.values()) > 0
