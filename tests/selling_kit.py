"""Shops that sell without a pause while servers fail, and the count afterwards."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from inventory_sdk import Inventory, Line, Receipt
from inventory_sdk.errors import OutcomeUnknown, Overloaded
from inventory_sdk.model import partition_of
from tests.stock_kit import Recorded

PARTITIONS: Final = 3
STOCK: Final = 100_000


def merchants() -> list[str]:
    """One per partition."""
    names = [f"m{n}" for n in range(40)]
    return [next(name for name in names if partition_of(name, PARTITIONS) == partition) for partition in range(PARTITIONS)]


class Sellers:
    """Buy one unit after the other at every partition, again under the same id where nobody knows, until told to stop."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.stopping = False
        self.receipts: dict[str, Receipt] = {}
        self.refusals: Counter[str] = Counter()

    def sold(self, partition: int) -> int:
        return sum(receipt.positions[0].partition == partition for receipt in self.receipts.values())

    def epochs(self, partition: int) -> set[int]:
        return {p.epoch for receipt in self.receipts.values() for p in receipt.positions if p.partition == partition}

    async def sell(self, merchant: str, name: str) -> None:
        number = 0
        while not self.stopping:
            number += 1
            operation_id = f"{name}-{number}"
            while True:
                try:
                    self.receipts[merchant + operation_id] = await self.inventory.stock.deduct(
                        [Line("a", 1)], merchant=merchant, operation_id=operation_id
                    )
                    await asyncio.sleep(0.005)
                    break
                except Overloaded as refused:
                    self.refusals[type(refused).__name__] += 1
                    await asyncio.sleep(min(refused.retry_after or 0.1, 0.1))
                except OutcomeUnknown:
                    self.refusals["OutcomeUnknown"] += 1

    @asynccontextmanager
    async def selling(self) -> AsyncIterator[Sellers]:
        tasks = [asyncio.create_task(self.sell(merchant, f"c{n}")) for merchant in merchants() for n in range(2)]
        try:
            yield self
            self.stopping = True
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def shop(url: Any, folder: Path, namespace: str, metrics: Recorded) -> AsyncIterator[Inventory]:
    inventory = Inventory(
        url,
        database=f"sqlite+aiosqlite:///{folder}/stock.db",
        partitions=PARTITIONS,
        namespace=namespace,
        metrics=[metrics],
        redis_timeout=1.0,
    )
    async with inventory:
        await inventory.create_schema()
        async with inventory.worker(take_over=1.0) as worker:
            for merchant in merchants():
                await inventory.stock.restock([Line("a", STOCK)], merchant=merchant, operation_id="po")
            await worker.ready()
            yield inventory


async def counted(inventory: Inventory, receipts: Mapping[str, Receipt]) -> list[str]:
    """Redis = ledger to the unit, every row's account closes, no id twice; the acknowledged ones that the ledger does not have."""
    await inventory.settled()
    assert await inventory.ledger.verify() == []
    missing: list[str] = []
    for merchant in merchants():
        level = await inventory.stock.level("a", merchant=merchant)
        (row,) = await inventory.ledger.stock([f"{merchant}\x1fa"])
        assert (level.available, level.reserved) == (row.available, row.reserved)
        mine = {key: receipt for key, receipt in receipts.items() if receipt.merchant == merchant}
        found = [key for key in mine if await inventory.ledger.operation(f"{merchant}\x1f{key.removeprefix(merchant)}") is not None]
        missing += sorted(set(mine) - set(found))
        assert STOCK - row.available >= len(found)
    return missing


def only_tails_are_missing(receipts: Mapping[str, Receipt], missing: list[str]) -> None:
    """Of an epoch the last ones may be lost with their server, never one before another that is there."""
    applied: dict[tuple[int, int], int] = {}
    for key in set(receipts) - set(missing):
        partition, epoch, sequence = receipts[key].positions[0]
        applied[partition, epoch] = max(sequence, applied.get((partition, epoch), 0))
    for key in missing:
        partition, epoch, sequence = receipts[key].positions[0]
        assert sequence > applied[partition, epoch], f"{key} was passed over"
