"""How long a partition is away when Redis has lost everything: the rebuild from the ledger, by the clock.

    python -m benchmarks.rebuild [--skus 100000] [--reservations 10000] [--results 100000] [--older 100000]

Starts a redis-server of its own; the ledger is PostgreSQL (``--database``), in tables of the benchmark's own. ``--results`` are
younger than ten minutes and restored before the partition opens, ``--older`` ones behind that, while it sells. What a recovery
waits for besides (RabbitMQ: one publish timeout of 5 s, what is left in the queue) is not part of it. The last line is one JSON
object:

    {"skus": …, "reservations": …, "results": …, "older": …, "seconds_till_open": …, "seconds_till_whole": …}
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
import uuid
from typing import Any, Final

from redis.asyncio import Redis

from benchmarks.memory import server
from benchmarks.options import DATABASE
from inventory_sdk.ledger.protocol import Entering
from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.metrics.nothing import NoMetrics
from inventory_sdk.model import JournalEntry, JournalOperation, fingerprint, key_of
from inventory_sdk.stock.engine import Engine, StockSettings
from inventory_sdk.sync.queues import from_url
from inventory_sdk.sync.recovery import open_first, rebuild

MERCHANT: Final = "m1"
TOGETHER: Final = 250
OLD_MS: Final = 3_600_000


async def fill(ledger: SqlLedger, given: argparse.Namespace) -> None:
    """SKUs by restock, reservations and sales by journal entries, as the worker applies them."""
    fields = [key_of(MERCHANT, f"sku-{number}") for number in range(given.skus)]
    for start in range(0, len(fields), 5000):
        flat = [part for field in fields[start : start + 5000] for part in (field, 1000)]
        mark = fingerprint("restock", "", flat)
        await ledger.enter(0, 1, [Entering("restock", key_of(MERCHANT, f"po-{start}"), mark, tuple(flat))])
    now = time.time_ns() // 1_000_000
    kinds = [("deduct", now - OLD_MS)] * given.older + [("reserve", now)] * given.reservations
    kinds += [("deduct", now)] * max(0, given.results - given.reservations)
    for sequence, start in enumerate(range(0, len(kinds), TOGETHER), 1):
        part = kinds[start : start + TOGETHER]
        operations = []
        for number, (kind, _) in enumerate(part, start):
            flat = [fields[number % len(fields)], 1]
            ends = now + 900_000 if kind == "reserve" else 0
            key = key_of(MERCHANT, f"order-{number}")
            operations.append(JournalOperation(kind, key, fingerprint(kind, "", flat), flat, [999], "", "", ends, ""))
        await ledger.apply(0, 1, [JournalEntry(0, 1, sequence, f"n{sequence}", part[0][1], tuple(operations))])


async def measure(url: str, given: argparse.Namespace) -> dict[str, Any]:
    """Fill, empty Redis, rebuild."""
    name = f"b{uuid.uuid4().hex[:8]}"
    ledger = SqlLedger(given.database, prefix=f"{name}_")
    await ledger.create_schema()
    client = Redis.from_url(url, protocol=2)
    engine = Engine(client, ledger, StockSettings(namespace=name), NoMetrics(), None, None, lambda *_: None)
    queue = from_url(None, name, client_factory=lambda: client)
    try:
        await open_first(engine.upkeep, ledger, queue, 0)
        print("filling the ledger …", flush=True)
        await fill(ledger, given)
        await client.flushall()
        row = await ledger.raise_epoch(0, 1)
        assert row is not None
        started = time.perf_counter()
        await rebuild(engine.upkeep, ledger, queue, row)
        opened = time.perf_counter() - started
        while await engine.upkeep.restore_older(0, row.epoch, ledger):
            pass
        whole = time.perf_counter() - started
        found: int = await client.hlen(engine.partitions[0].key("available"))  # type: ignore[misc]
        assert found == given.skus
    finally:
        await engine.close()
        await client.aclose()
        async with ledger.engine.begin() as connection:
            await connection.run_sync(ledger.tables.metadata.drop_all)
        await ledger.close()
    counts = {"skus": given.skus, "reservations": given.reservations, "results": given.results, "older": given.older}
    return counts | {"seconds_till_open": round(opened, 2), "seconds_till_whole": round(whole, 2)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--database", default=os.environ.get("INVENTORY_TEST_POSTGRESQL_URL", DATABASE))
    for name, default in (("skus", 100_000), ("reservations", 10_000), ("results", 100_000), ("older", 100_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    with server() as url:
        print(json.dumps(asyncio.run(measure(url, parser.parse_args()))))


if __name__ == "__main__":
    main()
