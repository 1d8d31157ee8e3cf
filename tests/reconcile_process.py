"""A shop with tables of its own, for tests that compare it while several processes sell.

    python -m tests.reconcile_process work <settings JSON>
    python -m tests.reconcile_process sell <settings JSON> <seed> <file with a JSON list of [merchant, sku]>

Each says ``ready`` and ends when its standard input does; ``sell`` then says what it has sold and supplied, per merchant and SKU.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Column, MetaData, String, Table, bindparam, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from inventory_sdk import Inventory, Line, Movement, OpeningBalance
from inventory_sdk.errors import InsufficientStock
from inventory_sdk.reconcile.model import Reconcile
from tests.seller_process import insist, say, told_to_stop


def own_table(prefix: str) -> Table:
    """The service's own."""
    key = {"primary_key": True}
    return Table(
        f"{prefix}shop",
        MetaData(),
        Column("merchant", String(64), **key),
        Column("sku", String(64), **key),
        Column("available", BigInteger),
    )


def make(settings: dict[str, Any], **more: Any) -> Inventory:
    """As every process of it makes it."""
    inventory = Inventory(
        metrics=[], merchant=None, reconcile=Reconcile(rate=1e9, daily_limit=10**9, every=None, whole_every=None), **settings, **more
    )
    table = own_table(settings["table_prefix"])

    @inventory.reads_stock
    async def read(merchant: str, skus: Sequence[str], session: AsyncSession) -> Iterable[OpeningBalance]:
        rows = await session.execute(select(table.c.sku, table.c.available).where(table.c.merchant == merchant, table.c.sku.in_(skus)))
        return [OpeningBalance(sku, available) for sku, available in rows]

    @inventory.writes_stock
    async def write(moves: Sequence[Movement], session: AsyncSession) -> None:
        connection = await session.connection()
        changed = update(table).where(table.c.merchant == bindparam("shop"), table.c.sku == bindparam("what"))
        await connection.execute(
            changed.values(available=table.c.available + bindparam("by")),
            [{"shop": move.merchant, "what": move.sku, "by": move.available} for move in moves],
        )

    return inventory


async def sell(
    inventory: Inventory, dice: random.Random, stop: asyncio.Event, stocked: list[list[str]], counts: dict[str, Counter[str]]
) -> None:
    """Deducts, holds that end in every way, restocks and returns, one after the other."""
    stock, number = inventory.stock, 0
    while not stop.is_set():
        number += 1
        name = f"{os.getpid()}-{dice.randrange(10**9)}-{number}"
        merchant, sku = dice.choice(stocked)
        quantity, key = dice.randint(1, 3), f"{merchant}\x1f{sku}"
        lines = [Line(sku, quantity)]
        act = dice.choices(("deduct", "confirm", "release", "expire", "restock", "take_back", "adjust"), (4, 3, 2, 1, 1, 1, 1))[0]
        try:
            if act in ("deduct", "take_back"):
                await insist(stop, stock.deduct, lines, operation_id=name, merchant=merchant)
                counts["sold"][key] += quantity
                if act == "take_back":
                    await insist(stop, stock.take_back, lines, of=name, operation_id=f"{name}-back", merchant=merchant)
                    counts["sold"][key] -= quantity
            elif act == "restock":
                await insist(stop, stock.restock, lines, operation_id=name, merchant=merchant)
                counts["supplied"][key] += quantity
            elif act == "adjust":
                await insist(stop, stock.adjust, [Line(sku, -quantity)], operation_id=name, merchant=merchant)
                counts["written_off"][key] += quantity
            else:
                await insist(stop, stock.reserve, lines, operation_id=name, ttl=0.3 if act == "expire" else 600, merchant=merchant)
                if act == "confirm":
                    await insist(stop, stock.confirm, name, merchant=merchant)
                    counts["sold"][key] += quantity
                elif act == "release":
                    await insist(stop, stock.release, name, merchant=merchant)
        except InsufficientStock:
            counts["short"][key] += 1
        await asyncio.sleep(dice.random() * 0.1)


def read(path: str) -> list[list[str]]:
    stocked: list[list[str]] = json.loads(Path(path).read_text())
    return stocked


async def main() -> None:
    what, settings = sys.argv[1], json.loads(sys.argv[2])
    stop = asyncio.Event()
    inventory = make(settings)
    async with inventory:
        waiting = asyncio.create_task(told_to_stop())
        waiting.add_done_callback(lambda _: stop.set())
        if what == "work":
            async with inventory.worker(housekeeping=0.1, idle=0.01) as worker:
                await worker.ready()
                say(act="ready")
                await stop.wait()
        else:
            say(act="ready")
            counts = {name: Counter[str]() for name in ("sold", "supplied", "written_off", "short")}
            stocked = read(sys.argv[4])
            await asyncio.gather(*(sell(inventory, random.Random(f"{sys.argv[3]}-{n}"), stop, stocked, counts) for n in range(4)))
            say(act="counted", **counts)
        waiting.cancel()
    say(act="ended")


if __name__ == "__main__":
    asyncio.run(main())
