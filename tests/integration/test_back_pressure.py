"""A worker that is behind, and a Redis that is full: callers are refused in time, nothing moves, and it all goes on by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.exceptions import OutOfMemoryError

from inventory_sdk import Inventory, Line
from inventory_sdk.errors import JournalFull, StockFrozen
from inventory_sdk.model import key_of
from tests.servers_kit import RedisServer, redis_server
from tests.stock_kit import shop_on

pytestmark = pytest.mark.redis
UNITS = 1_000_000


@pytest.fixture
def small() -> Iterator[RedisServer]:
    """A Redis that has room for a few thousand operations."""
    with redis_server("--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as server:
        yield server


def shop(url: str, folder: Path, cap: int = 1_000_000) -> Inventory:
    return Inventory(url, database=f"sqlite+aiosqlite:///{folder}/stock.db", merchant="m", metrics=(), journal_cap=cap)


@pytest.fixture
async def capped(tmp_path: Path) -> AsyncIterator[Inventory]:
    with redis_server() as server:
        async with shop(server.url, tmp_path, cap=12) as inventory:
            await inventory.create_schema()
            await inventory.stock.restock([Line("a", UNITS)], operation_id="opening")
            yield inventory


async def sell_until_refused(inventory: Inventory, prefix: str, most: int = 100_000, at_once: int = 1) -> tuple[int, JournalFull]:
    """How many were accepted, and the first refusal; ``at_once`` callers."""
    sold = 0
    refusal: JournalFull | None = None

    async def seller(number: int) -> None:
        nonlocal sold, refusal
        for count in range(most):
            if refusal is not None:
                return
            try:
                await inventory.stock.deduct([Line("a", 1)], operation_id=f"{prefix}-{number}-{count}".ljust(100, "."))
            except JournalFull as error:
                refusal = error
                return
            sold += 1

    await asyncio.gather(*(seller(number) for number in range(at_once)))
    assert refusal is not None
    assert not isinstance(refusal, StockFrozen)
    return sold, refusal


async def counted(inventory: Inventory, sold: int) -> None:
    """Redis, ledger and callers agree."""
    await inventory.settled()
    level = await inventory.stock.level("a")
    (row,) = await inventory.ledger.stock([key_of("m", "a")])
    assert (level.available, row.available, row.sold) == (UNITS - sold, UNITS - sold, sold)
    assert await inventory.ledger.verify() == []


async def test_with_the_worker_stopped_takes_go_on_to_the_cap_and_again_once_it_has_caught_up(capped: Inventory) -> None:
    held = await capped.stock.reserve([Line("a", 5)], operation_id="held")
    also = await capped.stock.reserve([Line("a", 5)], operation_id="also")
    sold, refusal = await sell_until_refused(capped, "first")
    assert sold == 9  # the credit and two holds are entries as well
    assert refusal.retry_after > 0
    assert (await capped.stock.level("a")).available == UNITS - 10 - sold
    # What ends a hold takes nothing: refusing it would keep stock from those who could sell it.
    await capped.stock.confirm(held.operation_id)
    await capped.stock.release(also.operation_id)
    with pytest.raises(JournalFull):
        await capped.stock.deduct([Line("a", 1)], operation_id="still-full")
    async with capped.worker(housekeeping=0.01) as worker:
        await worker.ready()
        await capped.settled()
        for number in range(40):
            # More than three times the cap, with a worker that keeps up: what is applied does not fill the journal.
            for _ in range(500):
                try:
                    await capped.stock.deduct([Line("a", 1)], operation_id=f"second-{number}")
                    break
                except JournalFull:
                    await asyncio.sleep(0.01)
            else:
                pytest.fail("the worker is there, and the journal stays full")
        await counted(capped, sold + 5 + 40)


async def test_a_redis_without_memory_refuses_moves_nothing_and_gets_out_of_it_by_itself(small: RedisServer, tmp_path: Path) -> None:
    async with shop(small.url, tmp_path) as inventory:
        await inventory.create_schema()
        await inventory.stock.restock([Line("a", UNITS)], operation_id="opening")
        await inventory.stock.reserve([Line("a", 3)], operation_id="brief", ttl=0.05)
        sold, refusal = await sell_until_refused(inventory, "first", at_once=64)
        assert sold > 1000
        assert "memory" in str(refusal)
        assert (await inventory.stock.level("a")).available == UNITS - 3 - sold
        async with inventory.worker(housekeeping=0.05) as worker:
            for _ in range(500):
                try:
                    await inventory.stock.deduct([Line("a", 1)], operation_id="second")
                    break
                except JournalFull:
                    await asyncio.sleep(0.02)
            else:
                pytest.fail("all was applied, and Redis stays full")
            await worker.ready()
            while (await inventory.stock.level("a")).reserved:
                await asyncio.sleep(0.02)
            await counted(inventory, sold + 1)


async def test_a_worker_on_a_full_redis_still_gives_signs_of_life(namespace: str) -> None:
    with redis_server() as server:
        async with shop_on(server.url, namespace, {"a": 5}) as stocked:
            upkeep = stocked.engine.upkeep
            await upkeep.heartbeat(0, "w")
            await stocked.client.pexpire(stocked.key("worker"), 2000)
            await stocked.client.config_set("maxmemory", "1mb")
            await upkeep.heartbeat(0, "w")
            seen = await upkeep.worker_seen(0)
            assert seen is not None
            assert seen < 5
            await stocked.client.delete(stocked.key("worker"))
            with pytest.raises(OutOfMemoryError):  # one that was silent is not brought back to life
                await upkeep.heartbeat(0, "w")
