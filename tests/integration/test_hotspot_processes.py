"""Real processes on real servers: a key that is cool in each of eight is found, their pace together is the limit, and SKUs go to Redis
and back under load in two of them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from inventory_sdk import Detection, Line
from tests.hotspot_process import SKUS, inventory

CYCLES = int(os.environ.get("INVENTORY_TEST_PROMOTIONS", "20"))
PROCESSES = 8


class Child:
    """One process, and what it says."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def says(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        assert line, "it died"
        return json.loads(line)  # type: ignore[no-any-return]

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"go\n")


@asynccontextmanager
async def children(asked: list[dict[str, Any]]) -> AsyncIterator[list[Child]]:
    found: list[Child] = []
    try:
        for each in asked:
            command = (sys.executable, "-W", "error", "-m", "tests.hotspot_process", json.dumps(each))
            pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
            found.append(Child(await asyncio.create_subprocess_exec(*command, **pipes)))
        yield found
        for child in found:
            assert await child.process.wait() == 0
    finally:
        for child in found:
            if child.process.returncode is None:
                child.process.kill()
                await child.process.wait()


@pytest.mark.redis
async def test_a_key_that_is_cool_in_each_of_eight_processes_and_hot_in_sum_is_found_and_paced_as_one(swept: str, redis_url: str) -> None:
    asked = {
        "mode": "call",
        "redis": redis_url,
        "database": "sqlite+aiosqlite://",
        "namespace": swept,
        "threshold": "120/second",
        "limit": "100/second",
        "rate": 30.0,  # of each, a quarter of the threshold
        "paced": 3.0,
    }
    async with children([asked] * PROCESSES) as processes:
        for process in processes:
            assert (await process.says())["ready"]
        for process in processes:
            process.go()
        seen = [await process.says() for process in processes]
    print(f"found after {sorted(round(each['seconds'], 3) for each in seen)} s; went {[each['went'] for each in seen]}")  # noqa: T201
    assert {each["top"] for each in seen} == {"flash"}
    assert max(each["local"] / max(each["seconds"], 0.001) for each in seen) < 60  # none of them could have known alone
    # Three seconds and a bit at 100 a second together; 8 × 100 if each kept a rate of its own.
    assert 30 < sum(each["went"] for each in seen) <= 4 * 100 * 1.25


@pytest.mark.redis
@pytest.mark.postgresql
async def test_skus_go_to_redis_and_back_under_load_in_two_processes_and_the_sums_are_right(
    swept: str, redis_url: str, postgresql_url: str
) -> None:
    asked = {"mode": "sell", "redis": redis_url, "database": postgresql_url, "namespace": swept, "buyers": 3}
    own = inventory({**asked, "name": "own"}, admission="auto", detection=Detection(stay=3600.0, promote="1000000/second"))
    async with own:
        await own.create_schema()
        await own.stock.restock([Line(sku, 10) for sku in SKUS], operation_id="opening")
        seed = int.from_bytes(os.urandom(4), "big")
        print(f"seed {seed}, {CYCLES} times")  # noqa: T201
        both = [
            {**asked, "name": "one", "cycles": CYCLES, "seed": seed},
            {**asked, "name": "two", "cycles": 0, "seed": seed + 1},
        ]
        async with children(both) as (mover, seller):
            for process in (mover, seller):
                assert (await process.says())["ready"]
                process.go()
            assert (await mover.says())["moved"]
            seller.go()
            seen = [await seller.says()]
            mover.go()
            mover.go()
            seen.append(await mover.says())
        print(seen)  # noqa: T201
        assert await own.ledger.verify() == []
        supplied = 10 * (CYCLES + 1)
        for sku in SKUS:
            sold = sum(each["sold"][sku] for each in seen)
            (row,) = await own.ledger.stock([f"m1\x1f{sku}"])
            assert (row.supplied, row.sold, row.reserved, row.available) == (supplied, sold, 0, supplied - sold)
            level = await own.stock.level(sku)
            assert (level.available, level.reserved) == (row.available, row.reserved)
        sides = {side: sum(each["sides"][side] for each in seen) for side in ("redis", "database")}
        assert min(sides.values()) > 0
        assert sum(each["short"] for each in seen) > 0  # more was wanted than there was
