"""Carts of one to three shops on real servers, from two processes, with repeats and callers that go away: in the end Redis is what
the ledger says, and the ledger is what a recount of the receipts gives."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from inventory_sdk import Inventory, Line
from inventory_sdk.errors import InsufficientStock, InventoryError
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.sync.queues import from_url
from tests.spanning_kit import HOME, shops

PARTITIONS = 4
SHOPS = shops(PARTITIONS)
UNITS = 200

pytestmark = [pytest.mark.redis, pytest.mark.amqp, pytest.mark.postgresql]


@pytest.mark.parametrize(("seed", "partition_by"), [(1, "merchant"), (2, "sku")])
async def test_carts_over_several_shops_end_in_one_truth(
    swept: str, redis_url: str, amqp_url: str, postgresql_url: str, seed: int, partition_by: Any
) -> None:
    chance = random.Random(seed)

    def process() -> Inventory:
        return Inventory(
            redis_url, queue=amqp_url, database=postgresql_url, merchant=HOME, namespace=swept, table_prefix=f"{swept}_",
            partitions=PARTITIONS, partition_by=partition_by, metrics=[NoMetrics()],
        )  # fmt: skip

    inventories = [process(), process()]
    sold: Counter[str] = Counter()
    held: Counter[str] = Counter()

    async def buy(number: int) -> None:
        cart = [Line("a", chance.randint(1, 3), shop) for shop in chance.sample(SHOPS, chance.randint(1, 3))]
        name, kind = f"o{number}", chance.choice(["deduct", "reserve", "confirm", "release"])
        stocks = chance.sample([inventory.stock for inventory in inventories], 2)
        away = chance.random() < 0.2

        async def take(which: int) -> None:
            stock = stocks[which]
            if kind == "deduct":
                await stock.deduct(cart, operation_id=name)
                return
            await stock.reserve(cart, operation_id=name)
            if kind == "confirm":
                await stock.confirm(name)
            elif kind == "release":
                await stock.release(name)

        if away:
            task = asyncio.create_task(take(0))
            await asyncio.sleep(chance.random() * 0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        try:
            await take(1)
        except InsufficientStock:
            return
        except InventoryError:
            # Who went away may have come as far as the release.
            if not away or kind != "release":
                raise
            return
        for line in cart:
            assert line.merchant is not None
            if kind in ("deduct", "confirm"):
                sold[line.merchant] += line.quantity
            elif kind == "reserve":
                held[line.merchant] += line.quantity

    async with inventories[0], inventories[1]:
        await inventories[0].create_schema()
        await inventories[1].create_schema()
        stock = inventories[0].stock
        await stock.restock([Line("a", UNITS, shop) for shop in SHOPS], operation_id="first")
        async with inventories[0].worker(housekeeping=0.1):
            for start in range(0, 120, 12):
                await asyncio.gather(*[buy(number) for number in range(start, start + 12)])
            async with asyncio.timeout(30):
                while True:
                    for inventory in inventories:
                        await inventory.settled()
                    rows = {row.merchant: row for row in await inventories[0].ledger.all_stock()}
                    if all((rows[shop].sold, rows[shop].reserved) == (sold[shop], held[shop]) for shop in SHOPS):
                        break
                    await asyncio.sleep(0.2)
            for shop in SHOPS:
                level = await stock.level("a", merchant=shop)
                assert (level.available, level.reserved) == (rows[shop].available, rows[shop].reserved)
                assert rows[shop].available == UNITS - sold[shop] - held[shop]
            assert await inventories[0].ledger.verify() == []
    queue = from_url(amqp_url, swept)
    await queue.start()
    for partition in range(PARTITIONS):
        await queue.delete(partition)
    await queue.close()
