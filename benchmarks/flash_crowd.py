"""A flood in one lane, and what buyers in another notice: ``python -m benchmarks.flash_crowd``.

One service process on Redis and PostgreSQL. Buyers (core) take one unit of SKUs of their own, a few at a time with pauses; an
import (batch) takes ``--lines`` lines per call from ``--flood`` callers that never pause. Three loads: buyers alone (quiet), with the
flood and no lanes, with the flood in lanes. Closed loops: a caller who is refused waits for as long as it was told.
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
from inventory_sdk import Inventory, Lane, LaneFull, Line
from inventory_sdk.metrics import NoMetrics

LANES = {
    "core": Lane(max_concurrency=64, max_queue=256, max_wait=0.05, timeout=2.0),
    "batch": Lane(max_concurrency=1, max_queue=64, max_wait=2.0, timeout=10.0, timeout_per_line=0.005, connections=1),
}
UNITS = 10**8
BUYERS = 8
PAUSE = 0.005
SHELVES = 16

Act = Callable[[list[Line], str], Awaitable[Any]]


@dataclass
class Seen:
    """What one load saw: seconds per buyer's call, calls of the flood that were done and refused, units sold by SKU."""

    buyers: list[float] = field(default_factory=list)
    flood: int = 0
    refused: int = 0

    def figures(self, seconds: float) -> dict[str, float]:
        """For the JSON object."""
        ordered = sorted(self.buyers)
        p50, p99 = (ordered[min(len(ordered) - 1, len(ordered) * part // 100)] * 1000 for part in (50, 99))
        return {
            "core_calls": len(ordered),
            "core_p50_ms": round(p50, 3),
            "core_p99_ms": round(p99, 3),
            "batch_tps": round(self.flood / seconds, 1),
            "batch_refused": self.refused,
        }


class Shop:
    """The service: the same function, with and without a lane."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.sold = 0
        self._numbers = count()

        async def take(lines: list[Line], operation_id: str) -> None:
            await inventory.stock.deduct(lines, operation_id=operation_id)
            self.sold += sum(line.quantity for line in lines)

        self.plain: Act = take
        self.core: Act = inventory.lane("core")(take)
        self.batch: Act = inventory.lane("batch", lines="lines")(take)

    async def load(self, seconds: float, buy: Act, flood: Act | None, flooders: int, many: list[Line]) -> Seen:
        """Buyers, and the flood if there is one, for so long."""
        seen = Seen()
        deadline = time.perf_counter() + seconds

        async def buyer(number: int) -> None:
            lines = [Line(f"shelf-{number % SHELVES}", 1)]
            while (began := time.perf_counter()) < deadline:
                await buy(lines, f"o{next(self._numbers)}")
                seen.buyers.append(time.perf_counter() - began)
                await asyncio.sleep(PAUSE)

        async def flooder(act: Act) -> None:
            while time.perf_counter() < deadline:
                try:
                    await act(many, f"o{next(self._numbers)}")
                    seen.flood += 1
                except LaneFull as full:
                    seen.refused += 1
                    await asyncio.sleep(full.retry_after)

        async with asyncio.TaskGroup() as group:
            for number in range(BUYERS):
                group.create_task(buyer(number))
            for _ in range(flooders if flood is not None else 0):
                assert flood is not None
                group.create_task(flooder(flood))
        return seen


async def main(redis: str, database: str, seconds: float, flooders: int, lines: int) -> None:
    """All of it; the last line is the JSON object."""
    name = f"b{uuid.uuid4().hex[:10]}"
    inventory = Inventory(redis, database=database, namespace=name, table_prefix=f"{name}_", lanes=LANES, metrics=[NoMetrics()])
    shop = Shop(inventory)
    many = [Line(f"bulk-{number}", 1) for number in range(lines)]
    result: dict[str, Any] = {"benchmark": "flash_crowd", "seconds": seconds, "flood": flooders, "lines": lines}
    wrong: list[str] = []
    try:
        async with inventory:
            await inventory.create_schema()
            skus = [f"shelf-{number}" for number in range(SHELVES)] + [line.sku for line in many]
            await inventory.stock.restock_many([Line(sku, UNITS) for sku in skus], operation_id="opening")
            await shop.load(1.0, shop.core, None, 0, many)  # warm
            loads: dict[str, tuple[Act, Act | None]] = {
                "quiet": (shop.core, None),
                "without": (shop.plain, shop.plain),
                "with": (shop.core, shop.batch),
            }
            for what, (buy, flood) in loads.items():
                seen = await shop.load(seconds, buy, flood, flooders, many)
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
    given = parser.parse_args()
    asyncio.run(main(given.redis, given.database, given.seconds, given.flood, given.lines))
