"""Faults to order: each is really met, and what the docs say of it is so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from inventory_sdk import Inventory, Line
from inventory_sdk.errors import DurabilityNotReached, InventoryError, StockFrozen
from inventory_sdk.ledger.protocol import LedgerUnavailable
from inventory_sdk.testing import faults

LINES = [Line("a", 1)]


@pytest.fixture
async def inventory() -> AsyncIterator[Inventory]:
    inventory = Inventory("memory://", metrics=[], redis_timeout=0.2)
    async with inventory:
        await inventory.stock.restock([Line("a", 10)], operation_id="first")
        yield inventory
        assert await inventory.ledger.verify() == []


async def books(inventory: Inventory) -> tuple[int, int, int]:
    """Available in Redis, available and sold in the ledger, once all is applied."""
    await inventory.settled()
    level = await inventory.stock.level("a")
    (row,) = await inventory.ledger.stock(["default\x1fa"])
    return level.available, row.available, row.sold


async def test_a_lost_reply_sells_once_and_the_caller_gets_its_receipt(inventory: Inventory) -> None:
    with faults.reply_lost(inventory) as fault:
        receipt = await inventory.stock.deduct(LINES, operation_id="o1")
    assert fault.met == 1
    assert receipt.lines[0].remaining == 9
    assert await books(inventory) == (9, 9, 1)


async def test_a_call_that_begins_while_redis_is_away_succeeds_when_it_is_back(inventory: Inventory) -> None:
    with faults.redis_away(inventory) as fault:
        call = asyncio.create_task(inventory.stock.deduct(LINES, operation_id="o1"))
        while fault.met < 3:
            await asyncio.sleep(0.01)
        assert not call.done()
    await call
    assert await books(inventory) == (9, 9, 1)


async def test_a_recalculation_that_is_asked_for_while_redis_is_away_is_run_when_it_is_back() -> None:
    """What talks to Redis beside the stock meets the client's own error: it knows no other, and would die of it."""
    inventory, ran = Inventory("memory://", metrics=[]), asyncio.Event()

    @inventory.coalesce(key="{shop}", debounce=0, max_wait=0)
    async def recalculate(shop: str) -> None:
        ran.set()

    @inventory.trigger("sold", runs=recalculate)
    async def sold(shop: str) -> None:
        pass

    async with inventory:
        with faults.redis_away(inventory) as fault:
            call = asyncio.create_task(sold("s1"))
            while fault.met < 3:
                await asyncio.sleep(0.01)
        await call
        await asyncio.wait_for(ran.wait(), 10)


async def test_sales_go_on_while_the_database_is_away_and_reach_it_afterwards(inventory: Inventory) -> None:
    with faults.database_away(inventory) as fault:
        await inventory.stock.deduct(LINES, operation_id="o1")
        entering = asyncio.create_task(inventory.stock.restock(LINES, operation_id="second"))  # what enters is tried for ten seconds
        while fault.met < 3:
            await asyncio.sleep(0.01)
        assert not entering.done()
        with pytest.raises(LedgerUnavailable, match="disconnected"):
            await inventory.ledger.operation("default\x1fo1")
    assert (await entering).operation_id == "second"
    assert await books(inventory) == (10, 10, 1)


async def test_a_commit_whose_answer_is_lost_is_not_made_twice(inventory: Inventory) -> None:
    with faults.commit_unheard(inventory, times=3) as fault:
        for number in range(5):
            await inventory.stock.deduct(LINES, operation_id=f"o{number}")
            await asyncio.sleep(0.05)
        assert await books(inventory) == (5, 5, 5)
    assert fault.met == 3


async def test_without_a_worker_the_ledger_stands_still_and_catches_up_later(inventory: Inventory) -> None:
    async with faults.worker_away(inventory):
        await inventory.stock.deduct(LINES, operation_id="o1")
        with pytest.raises(DurabilityNotReached):
            await inventory.settled(timeout=0.2)
        assert (await inventory.ledger.stock(["default\x1fa"]))[0].sold == 0
    assert await books(inventory) == (9, 9, 1)


async def test_an_emptied_redis_is_built_anew_from_the_ledger(inventory: Inventory) -> None:
    await inventory.stock.deduct(LINES, operation_id="o1")
    await inventory.settled()
    assert await faults.empty_redis(inventory) >= 3
    refusals = 0
    while True:
        try:
            await inventory.stock.deduct(LINES, operation_id="o2")
            break
        except StockFrozen as frozen:
            refusals += 1
            await asyncio.sleep(frozen.retry_after)
    assert refusals
    assert (await inventory.stock.deduct(LINES, operation_id="o1")).replayed
    assert await books(inventory) == (8, 8, 2)


async def test_a_fault_within_one_of_its_kind_leaves_the_outer_one_standing(inventory: Inventory) -> None:
    with faults.reply_lost(inventory, times=2) as outer:
        with faults.reply_lost(inventory, times=0):
            await inventory.stock.deduct(LINES, operation_id="o1")
        await inventory.stock.deduct(LINES, operation_id="o2")
    await inventory.stock.deduct(LINES, operation_id="o3")
    assert outer.met == 2
    assert await books(inventory) == (7, 7, 3)


async def test_a_fault_that_can_not_be_met_is_refused(inventory: Inventory) -> None:
    with pytest.raises(InventoryError, match="queue that confirms"), faults.queue_away(inventory):
        pass
