"""Stock changes hands while several processes sell it: counted to the unit afterwards. Random sellers print their seed;
INVENTORY_TEST_SEED replays them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from inventory_sdk import Inventory, Line
from tests.seller_process import MERCHANT, make

pytestmark = [pytest.mark.redis, pytest.mark.postgresql]


@pytest.fixture
def settings(swept: str, redis_url: str, postgresql_url: str) -> dict[str, Any]:
    return {"redis": redis_url, "database": postgresql_url, "namespace": swept, "table_prefix": f"{swept}_", "admission": "database"}


class Process:
    """One of ``tests.seller_process``; ``facts`` are what it has said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.facts: list[dict[str, Any]] = []
        self._said = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.facts.append(json.loads(line))
            self._said.set()
        self._said.set()

    async def until(self, condition: Callable[[list[dict[str, Any]]], object], seconds: float = 60.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition(self.facts):
                self._said.clear()
                assert not self._reading.done(), f"ended too early: {self.facts[-3:]}"
                await self._said.wait()

    def count(self, act: str) -> int:
        return sum(fact["act"] == act for fact in self.facts)

    async def stop(self) -> None:
        if self.process.stdin is not None and not self.process.stdin.is_closing():
            self.process.stdin.close()
        async with asyncio.timeout(60):
            await self._reading
            assert await self.process.wait() == 0, self.facts[-3:]

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()
        await self._reading


@asynccontextmanager
async def running(what: str, settings: dict[str, Any], more: int = 0) -> AsyncIterator[Process]:
    command = [sys.executable, "-m", "tests.seller_process", what, json.dumps(settings), str(more)]
    pipe = asyncio.subprocess.PIPE
    process = Process(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))
    try:
        await process.until(lambda facts: facts)
        yield process
    finally:
        if process.process.returncode is None:
            process.process.kill()
            await process.process.wait()
        await process._reading


def dice() -> int:
    seed = int(os.environ.get("INVENTORY_TEST_SEED", random.randrange(10**6)))
    print(f"INVENTORY_TEST_SEED={seed}")  # noqa: T201 - shown with a failure
    return seed


async def count(inventory: Inventory, sellers: list[Process], stocked: dict[str, int]) -> None:
    """Ledger, Redis and what the sellers heard agree to the unit."""
    wrong = [fact for seller in sellers for fact in seller.facts if fact["act"] == "wrong"]
    assert not wrong, wrong[:5]
    sold: Counter[str] = Counter()
    supplied = Counter(stocked)
    for fact in (fact for seller in sellers for fact in seller.facts):
        if fact["act"] in ("sold", "supplied"):
            (sold if fact["act"] == "sold" else supplied)[fact["sku"]] += fact["quantity"]
    assert await inventory.ledger.verify() == []
    for row in await inventory.ledger.all_stock(MERCHANT):
        assert row.sold == sold[row.sku], f"{row}: the sellers were told {sold[row.sku]}"
        assert row.supplied == supplied[row.sku], f"{row}: {supplied[row.sku]} were supplied"
        level = await inventory.stock.level(row.sku)
        assert (level.available, level.reserved) == (row.available, row.reserved), f"{row}, but {level}"


async def settle(inventory: Inventory) -> None:
    """Every hold has run out (none is longer than the sellers' own) and the ledger has it all."""
    async with asyncio.timeout(30):
        while True:
            await inventory.settled()
            rows = await inventory.ledger.all_stock(MERCHANT)
            if not any(row.reserved for row in rows):
                return
            await asyncio.sleep(0.1)


@asynccontextmanager
async def shop(settings: dict[str, Any]) -> AsyncIterator[Inventory]:
    async with make(settings) as inventory:
        await inventory.create_schema()
        yield inventory


async def test_processes_sell_while_the_stock_changes_hands_twenty_times(settings: dict[str, Any]) -> None:
    stocked = {"a": 400, "b": 250}
    seed = dice()
    async with shop(settings) as inventory:
        await inventory.stock.restock([Line(sku, units) for sku, units in stocked.items()], operation_id="po")
        async with (
            running("work", settings) as worker,
            running("sell", settings, seed) as one,
            running("sell", {**settings, "admission": "redis"}, seed + 1) as two,
            running("flip", settings, 22) as flipper,
        ):
            await flipper.until(lambda facts: sum(fact["act"] == "flipped" for fact in facts) >= 22, 120)
            await asyncio.gather(one.stop(), two.stop(), flipper.stop())
            await settle(inventory)
            await count(inventory, [one, two], stocked)
            assert one.count("sold") + two.count("sold") > 50
            await worker.stop()


async def test_two_processes_that_hand_over_in_both_directions_leave_one_seller(settings: dict[str, Any]) -> None:
    stocked = {"a": 2000, "b": 2000}
    seed = dice()
    async with shop(settings) as inventory:
        await inventory.stock.restock([Line(sku, units) for sku, units in stocked.items()], operation_id="po")
        async with (
            running("work", settings) as worker,
            running("sell", settings, seed) as seller,
            running("flip", settings, 8) as one,
            running("flip", settings, 9) as two,
        ):
            for flipper in (one, two):
                await flipper.until(lambda facts: sum(fact["act"] == "flipped" for fact in facts) >= 8, 120)
            await asyncio.gather(one.stop(), two.stop(), seller.stop())
            await settle(inventory)
            await count(inventory, [seller], stocked)
            await worker.stop()


@pytest.mark.parametrize("step", range(2))
async def test_a_process_killed_while_it_hands_over_is_followed_by_the_next_call(settings: dict[str, Any], step: int) -> None:
    stocked = {"a": 2000, "b": 2000, **{f"s{number:04}": 5 for number in range(300)}}
    seed = dice() + step
    chance = random.Random(seed)
    async with shop(settings) as inventory:
        await inventory.stock.restock_many([Line(sku, units) for sku, units in stocked.items()], operation_id="po")
        async with running("work", settings) as worker, running("sell", settings, seed) as seller:
            for _ in range(4):
                async with running("flip", settings, 1000) as flipper:
                    await flipper.until(lambda facts: sum(fact["act"] == "flipped" for fact in facts) >= chance.randint(0, 1))
                    await asyncio.sleep(chance.random() * 0.15)
                    await flipper.kill()
                await (inventory.stock.adopt(MERCHANT) if chance.random() < 0.5 else inventory.stock.withdraw(MERCHANT))
            await seller.stop()
            await settle(inventory)
            await count(inventory, [seller], stocked)
            await worker.stop()


async def test_redis_holds_nothing_of_the_namespace_that_the_ledger_does_not(settings: dict[str, Any], redis_url: str) -> None:
    """After a withdrawal no hold is left in Redis, and its counters say that they are not for sale."""
    async with shop(settings) as inventory, running("work", settings):
        stock = inventory.stock
        await stock.restock([Line("a", 5)], operation_id="po")
        await stock.adopt(MERCHANT)
        await stock.reserve([Line("a", 2)], operation_id="h1")
        await stock.withdraw(MERCHANT)
        client = Redis.from_url(redis_url)
        tag = f"{{{settings['namespace']}:0}}"
        assert await client.hgetall(f"{tag}:reservations") == {}
        assert await client.zrange(f"{tag}:expiry", 0, -1) == []
        assert [mark[:1] for mark in (await client.hgetall(f"{tag}:frozen")).values()] == [b"w"]
        await client.aclose()
        await stock.confirm("h1")
        assert (await stock.level("a")).available == 3
