"""What the management pages cost: each list's first page, a page in its middle, and its last one, over many operations.

    python -m benchmarks.pages --database sqlite+aiosqlite:////var/tmp/pages.db --operations 1000000

The operations go through the ledger's own ``apply``, so the time that takes is that of a worker; the tables are removed afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any, Final

from inventory_sdk.ledger.pages import Moment
from inventory_sdk.ledger.protocol import Entering
from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.model import JournalEntry, JournalOperation, Position, fingerprint, key_of

BATCH: Final = 1000
MERCHANTS: Final = 10
SKUS: Final = 100
ROUNDS: Final = 20
BEGAN: Final = 1_700_000_000_000


async def main(database: str, operations: int) -> None:
    ledger = SqlLedger(database, prefix=f"b{uuid.uuid4().hex[:8]}_")
    await ledger.create_schema()
    try:
        await fill(ledger, operations)
        await measure(ledger, operations)
    finally:
        async with ledger.engine.begin() as connection:
            await connection.run_sync(ledger.tables.metadata.drop_all)
        await ledger.close()


async def fill(ledger: SqlLedger, operations: int) -> None:
    raised = await ledger.raise_epoch(0, 0)
    assert raised is not None
    async with ledger.rebuilding(0, raised.epoch) as reading:
        await reading.open()
    for merchant in range(MERCHANTS):
        lines: list[Any] = []
        for sku in sorted(f"sku-{number}" for number in range(SKUS)):
            lines += [key_of(f"m{merchant}", sku), 10**8]
        await ledger.enter(0, 1, [Entering("restock", key_of(f"m{merchant}", "po"), fingerprint("restock", "", lines), tuple(lines))])
    began = time.perf_counter()
    for sequence in range(1, operations // BATCH + 1):
        await ledger.apply(0, 1, [batch(sequence)])
    seconds = time.perf_counter() - began
    print(f"{operations:,} operations applied in {seconds:.1f} s: {operations / seconds:,.0f} per second")


def batch(sequence: int) -> JournalEntry:
    made = []
    for place in range(BATCH):
        number = sequence * BATCH + place
        merchant = f"m{number % MERCHANTS}"
        lines = [key_of(merchant, f"sku-{number // MERCHANTS % SKUS}"), 1]
        mark = fingerprint("deduct", "", lines)
        order = f"order-{number // 30}" if number % 2 else "the-same-for-all"
        made.append(JournalOperation("deduct", key_of(merchant, f"o-{number}"), mark, lines, [1], order, "", 0, ""))
    return JournalEntry(0, 1, sequence, f"nonce-{sequence}", BEGAN + sequence * 10, tuple(made))


async def measure(ledger: SqlLedger, operations: int) -> None:
    pages, last = ledger.pages, operations // BATCH
    middle = Moment(BEGAN + last // 2 * 10, 0, 1, last // 2, 500)
    oldest = Moment(BEGAN + 20, 0, 1, 2, 0)
    version = operations // MERCHANTS // SKUS
    asked: list[tuple[str, Callable[[], Awaitable[Any]]]] = []
    for name, filters in (
        ("a merchant's operations", {"merchant": "m3"}),
        ("an order of half of all operations", {"order": "the-same-for-all"}),
        ("the same, of one merchant", {"order": "the-same-for-all", "merchant": "m2"}),
    ):
        for where, before in (("first page", None), ("in the middle", middle), ("last page", oldest)):
            asked.append((f"{name}, {where}", lambda filters=filters, before=before: pages.operations(**filters, before=before)))
    asked += [
        ("an ordinary order", lambda: pages.operations(order=f"order-{operations // 60}")),
        ("an operation by its id alone", lambda: pages.named(f"o-{operations // 2}")),
        ("a product's changes, first page", lambda: pages.changes("m3", "sku-7")),
        ("a product's changes, last page", lambda: pages.changes("m3", "sku-7", before=min(60, version))),
        ("an operation's life", lambda: pages.life(Position(0, 1, last // 2), 500)),
        ("products by the beginning of their name", lambda: pages.products(prefix="sku-9")),
        ("merchants", pages.merchants),
    ]
    for name, ask in asked:
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            await ask()
            times.append(time.perf_counter() - began)
        print(f"{name:48} {median(times) * 1000:8.1f} ms   at most {max(times) * 1000:8.1f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", required=True)
    parser.add_argument("--operations", type=int, default=1_000_000)
    options = parser.parse_args()
    asyncio.run(main(options.database, options.operations))
