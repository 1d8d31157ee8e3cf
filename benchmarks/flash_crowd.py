"""A flood in one lane and a crowd on one SKU, and what buyers of other SKUs notice: ``python -m benchmarks.flash_crowd``.

One service process on Redis and PostgreSQL. Buyers (core) take one unit of SKUs of their own, a few at a time with pauses; a crowd of
``--crowd`` callers (core as well) wants one unit of the same SKU and never pauses; an import (batch) takes ``--lines`` lines per call from
``--flood`` callers that never pause. Three loads: buyers alone (quiet), with crowd and flood and nothing of ours around the calls, with
both behind lanes and a hotspot's pace. Closed loops: a caller who is refused waits for as long as it was told.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.load import finish
from benchmarks.options import DATABASE, REDIS
from inventory_sdk import Inventory, Lane, LaneFull, Line, Overloaded
from inventory_sdk.metrics import NoMetrics

LANES = {
    "core": Lane(max_concurrency=64, max_queue=256, max_wait=0.05, timeout=2.0),
    "batch": Lane(max_concurrency=1, max_queue=64, max_wait=2.0, timeout=10.0, timeout_per_line=0.005, connections=1),
}
UNITS = 10**8
BUYERS = 8
PAUSE = 0.005
SHELVES = 16

HOT = "hot"
LEAD = 1.5
"""Seconds of each load that are not counted: until what is hot is known, nothing is paced."""
RULE = {"threshold": "100/second", "limit": "200/second", "max_wait": 0.1}

Act = Callable[[list[Line], str], Awaitable[Any]]


@dataclass
class Seen:
    """What one load saw: seconds per buyer's call and per call of the crowd, calls of flood and crowd that were done and refused."""

    buyers: list[float] = field(default_factory=list)
    flood: int = 0
    refused: int = 0
    crowd: list[float] = field(default_factory=list)
    crowd_refused: int = 0
    buyers_refused: int = 0

    def figures(self, seconds: float) -> dict[str, float]:
        """For the JSON object."""
        ordered = sorted(self.buyers)
        p50, p99 = (ordered[min(len(ordered) - 1, len(ordered) * part // 100)] * 1000 for part in (50, 99))
        return {
            "core_calls": len(ordered),
            "core_p50_ms": round(p50, 3),
            "core_p99_ms": round(p99, 3),
            "batch_tps": round(self.flood / seconds, 1),
            "core_refused": self.buyers_refused,
            "batch_refused": self.refused,
            "hot_goodput": round(len(self.crowd) / seconds, 1),
            "hot_success_rate": round(len(self.crowd) / max(1, len(self.crowd) + self.crowd_refused), 3),
            "hot_p99_ms": round(sorted(self.crowd)[len(self.crowd) * 99 // 100] * 1000, 3) if self.crowd else 0.0,
        }


class Shop:
    """The service: the same function, with and without our aspects."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.sold = 0
        self._numbers = count()

        async def take(lines: list[Line], operation_id: str) -> None:
            await inventory.stock.deduct(lines, operation_id=operation_id)
            self.sold += sum(line.quantity for line in lines)

        self.plain: Act = take
        paced: Any = inventory.hotspot(**RULE, keys=lambda lines: [line.sku for line in lines])  # type: ignore[arg-type]
        self.core: Act = inventory.lane("core")(paced(take))
        self.batch: Act = inventory.lane("batch", lines="lines")(take)

    async def load(self, seconds: float, buy: Act, flood: Act | None, flooders: int, many: list[Line], crowd: int) -> Seen:
        """Buyers, and flood and crowd if there is a flood, for so long."""
        early, seen = Seen(), Seen()
        counted = time.perf_counter() + LEAD
        deadline = counted + seconds

        def now() -> Seen:
            return seen if time.perf_counter() >= counted else early

        async def buyer(number: int) -> None:
            lines = [Line(f"shelf-{number % SHELVES}", 1)]
            while (began := time.perf_counter()) < deadline:
                try:
                    await buy(lines, f"o{next(self._numbers)}")
                    now().buyers.append(time.perf_counter() - began)
                except Overloaded:
                    now().buyers_refused += 1
                await asyncio.sleep(PAUSE)

        async def one_of_the_crowd() -> None:
            while (began := time.perf_counter()) < deadline:
                try:
                    await buy([Line(HOT, 1)], f"o{next(self._numbers)}")
                    now().crowd.append(time.perf_counter() - began)
                except Overloaded as full:
                    now().crowd_refused += 1
                    await asyncio.sleep(full.retry_after)

        async def flooder(act: Act) -> None:
            while time.perf_counter() < deadline:
                try:
                    await act(many, f"o{next(self._numbers)}")
                    now().flood += 1
                except LaneFull as full:
                    now().refused += 1
                    await asyncio.sleep(full.retry_after)

        async with asyncio.TaskGroup() as group:
            for number in range(BUYERS):
                group.create_task(buyer(number))
            for _ in range(crowd if flood is not None else 0):
                group.create_task(one_of_the_crowd())
            for _ in range(flooders if flood is not None else 0):
                assert flood is not None
                group.create_task(flooder(flood))
        return seen


async def main(redis: str, database: str, seconds: float, flooders: int, lines: int, crowd: int) -> None:
    """All of it; the last line is the JSON object."""
    name = f"b{uuid.uuid4().hex[:10]}"
    inventory = Inventory(redis, database=database, namespace=name, table_prefix=f"{name}_", lanes=LANES, metrics=[NoMetrics()])
    shop = Shop(inventory)
    many = [Line(f"bulk-{number}", 1) for number in range(lines)]
    result: dict[str, Any] = {"benchmark": "flash_crowd", "seconds": seconds, "flood": flooders, "lines": lines, "crowd": crowd}
    wrong: list[str] = []
    try:
        async with inventory:
            await inventory.create_schema()
            skus = [f"shelf-{number}" for number in range(SHELVES)] + [line.sku for line in many] + [HOT]
            await inventory.stock.restock_many([Line(sku, UNITS) for sku in skus], operation_id="opening")
            await shop.load(1.0, shop.core, None, 0, many, 0)  # warm
            loads: dict[str, tuple[Act, Act | None]] = {
                "quiet": (shop.core, None),
                "without": (shop.plain, shop.plain),
                "with": (shop.core, shop.batch),
            }
            for what, (buy, flood) in loads.items():
                seen = await shop.load(seconds, buy, flood, flooders, many, crowd)
                result[what] = seen.figures(seconds)
                print(f"{what:<8} {result[what]}", flush=True)
            levels = await inventory.stock.levels(skus)
            left = sum(level.available for level in levels.values())
            if left != UNITS * len(skus) - shop.sold:
                wrong.append(f"{shop.sold} sold of {UNITS * len(skus)}, and {left} are left")
    finally:
        await _remove(redis, database, name, inventory)
    for what in ("with", "without"):
        result[f"core_p99_ratio_{what}"] = round(result[what]["core_p99_ms"] / result["quiet"]["core_p99_ms"], 2)
    finish(result, wrong)


async def _remove(redis: str, database: str, name: str, inventory: Inventory) -> None:
    engine = create_async_engine(database)
    client = Redis.from_url(redis)
    try:
        ledger: Any = inventory.ledger
        async with engine.begin() as connection:
            await connection.run_sync(ledger.tables.metadata.drop_all)
        async for key in client.scan_iter(match=f"{{{name}:*", count=1000):
            await client.unlink(key)
    finally:
        await engine.dispose()
        await client.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--redis", default=os.environ.get("INVENTORY_TEST_REDIS_URL", REDIS))
    parser.add_argument("--database", default=os.environ.get("INVENTORY_TEST_POSTGRESQL_URL", DATABASE))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load (default %(default)s)")
    parser.add_argument("--flood", type=int, default=128, help="callers of the import (default %(default)s)")
    parser.add_argument("--lines", type=int, default=50, help="lines of one call of the import (default %(default)s)")
    parser.add_argument("--crowd", type=int, default=64, help="callers that want the hot SKU (default %(default)s)")
    given = parser.parse_args()
    asyncio.run(main(given.redis, given.database, given.seconds, given.flood, given.lines, given.crowd))
