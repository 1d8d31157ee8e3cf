"""A release that nobody published, its units sold at ``queue``, Redis lost: the ledger can cover the sale."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from inventory_sdk import DurabilityNotReached, Inventory, Line
from inventory_sdk.testing import faults
from tests.servers_kit import redis_server

pytestmark = [pytest.mark.redis, pytest.mark.amqp]  # the fixture sweeps both


@pytest.mark.parametrize("how", ["release", "a part", "undo", "expire"])
async def test_a_sale_of_given_back_units_outlives_the_total_loss_of_redis(swept: str, amqp_url: str, tmp_path: Path, how: str) -> None:
    with redis_server() as server:
        inventory = Inventory(server.url, queue=amqp_url, database=f"sqlite+aiosqlite:///{tmp_path}/stock.db", namespace=swept, metrics=[])
        async with inventory:
            await inventory.create_schema()
            stock = inventory.stock
            await stock.restock([Line("a", 2)], operation_id="po")
            held = await stock.reserve([Line("a", 2)], operation_id="hold")
            running = inventory._ready()
            with faults.queue_away(inventory) as away:
                if how == "release":
                    await stock.release("hold", durability="redis")
                elif how == "a part":
                    await stock.release("hold", lines=[Line("a", 1)], operation_id="p1", durability="redis")
                    await stock.release("hold", lines=[Line("a", 1)], operation_id="p2", durability="redis")
                elif how == "undo":
                    assert await stock.undo(held)
                else:
                    await stock.extend("hold", ttl=0.001)
                    while not (due := await running.engine.upkeep.due_expiries(0, 10)):
                        await asyncio.sleep(0.005)
                    await running.engine.upkeep.expire(0, due)
                # While the giver can't be published, neither can a sale of its units be acknowledged; it stands.
                with pytest.raises(DurabilityNotReached, match="'sale' was done and stands"):
                    await stock.deduct([Line("a", 2)], operation_id="sale", durability="queue")
                await running.engine.drain()
                assert away.met
            again = await stock.deduct([Line("a", 2)], operation_id="sale", durability="queue")
            assert again.replayed
            with server.client() as client:
                client.flushall()
            async with inventory.worker():
                async with asyncio.timeout(60):
                    while True:
                        (row,) = await inventory.ledger.stock(["default\x1fa"])
                        if row.sold == 2:
                            break
                        await asyncio.sleep(0.05)
                assert (row.available, row.reserved, row.sold) == (0, 0, 2)
                sale = await inventory.ledger.operation("default\x1fsale")
                assert sale is not None
                assert sale.status == "applied"
                assert await inventory.ledger.verify() == []
