"""What it costs to keep the service's own tables: nothing, once per batch (``writes_stock``), or a function per operation.

plain          durable rate without any writes of the service
writes_stock   one UPDATE per SKU and one INSERT of all log rows, per batch, in the ledger's transaction
later          a ``run="later"`` function per operation, each in a savepoint, all on the same hot row

Loads with the first of ``--callers``.
"""

from __future__ import annotations

import asyncio
import time
from types import ModuleType
from typing import Any, Final

from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from benchmarks.load import WARM_UP, finish, put, report
from benchmarks.options import Options, parse
from benchmarks.stand import PATIENCE, SKU, UNITS, stand
from inventory_sdk import Line

LATER: Final = 1_000
"""Operations with a function each: enough for seconds of work."""


async def durable(options: Options, writes: str, result: dict[str, Any], wrong: list[str]) -> None:
    """The durable rate with or without ``writes_stock``, and the service's tables against what was sold."""
    callers = options.callers[0]
    name = "plain" if writes == "none" else "writes_stock"
    async with stand(options, writes, part=writes) as (here, shop), _engine(options.database) as engine:
        await _open(engine, shop)
        call = here.selling("redis")
        await put(call, callers, WARM_UP)
        reading = await here.durable(call, callers, options.seconds)
        report(f"{name}, {callers} callers", reading.load, f"in PostgreSQL {reading.tps:,.0f}/s")
        result[name] = {"durable_tps": round(reading.tps), **reading.load.figures()}
        wrong += await here.check()
        if writes == "batch":
            wrong += await _compare(engine, shop, here.sold)


async def later(options: Options, result: dict[str, Any], wrong: list[str]) -> None:
    """From the first call until the last function's transaction was committed."""
    callers = options.callers[0]
    async with stand(options, "later", part="later") as (here, shop), _engine(options.database) as engine:
        await _open(engine, shop)
        numbers = iter(range(LATER))
        lines = [Line(SKU, 1)]

        async def caller() -> None:
            for number in numbers:
                await shop.sell(f"later-{number}", lines)
                here.sold += 1

        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(caller())
        answered = time.perf_counter() - started
        async with asyncio.timeout(PATIENCE):
            while await _logged(engine, shop) < LATER:
                await asyncio.sleep(0.1)
        seconds = time.perf_counter() - started
        print(f"later: {LATER} calls answered in {answered:.2f} s, their functions done at {LATER / seconds:,.0f}/s", flush=True)
        result["later"] = {"functions_per_s": round(LATER / seconds), "answered_s": round(answered, 3), "operations": LATER}
        wrong += await here.check()
        wrong += await _compare(engine, shop, here.sold)


def _engine(database: str) -> _Disposed:
    return _Disposed(create_async_engine(database))


class _Disposed:
    """An engine for the time of a block."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def __aenter__(self) -> AsyncEngine:
        return self._engine

    async def __aexit__(self, *_: object) -> None:
        await self._engine.dispose()


async def _open(engine: AsyncEngine, shop: ModuleType) -> None:
    async with engine.begin() as connection:
        await connection.execute(insert(shop.product).values(sku=SKU, available=UNITS))


async def _logged(engine: AsyncEngine, shop: ModuleType) -> int:
    async with engine.connect() as connection:
        return int((await connection.execute(select(func.count()).select_from(shop.product_log))).scalar_one())


async def _compare(engine: AsyncEngine, shop: ModuleType, sold: int) -> list[str]:
    """The service's own row and log against what was sold since ``_open``."""
    async with engine.connect() as connection:
        left = (await connection.execute(select(shop.product.c.available))).scalar_one()
        taken = select(func.count(), func.sum(shop.product_log.c.change)).where(shop.product_log.c.change < 0)
        rows, units = (await connection.execute(taken)).one()
    expected = UNITS - sold
    if (left, rows, units) == (expected, sold, -sold):
        return []
    return [f"own tables: {sold} sold; {left} left where {expected} are expected, {rows} log rows over {units} units"]


async def main(options: Options) -> None:
    """Plain, once per batch, once per operation."""
    result: dict[str, Any] = {"benchmark": "own_tables", "seconds": options.seconds}
    wrong: list[str] = []
    for writes in ("none", "batch"):
        await durable(options, writes, result, wrong)
    await later(options, result, wrong)
    result["ratio_writes_stock"] = round(result["writes_stock"]["durable_tps"] / result["plain"]["durable_tps"], 2)
    finish(result, wrong)


if __name__ == "__main__":
    asyncio.run(main(parse(__doc__, callers="256")))
