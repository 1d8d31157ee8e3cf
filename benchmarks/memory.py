"""Bytes of Redis memory per remembered deduct, per live reservation and per journaled operation, all of one line.

    python benchmarks/memory.py [operations, default 200000]

Starts a redis-server of its own (none of yours is touched). Ids are like order-1234567, the merchant is m1, the SKU sku-1, as a
shop would have them. What an operation costs is measured as the difference of ``used_memory``; the journal's share is taken out
by trimming it. The last line is one JSON object:

    {"bytes_per_result": …, "bytes_per_reservation": …, "bytes_per_journaled": …}

``bytes_per_result``: its record in the results window. ``bytes_per_reservation``: all that one more live reservation costs, which
is its record, its place in the expiry set, and its result. ``bytes_per_journaled``: its share of a journal entry (batches of 256).
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from inventory_sdk.ledger.protocol import Balance
from inventory_sdk.metrics.nothing import NoMetrics
from inventory_sdk.model import Line, Receipt, key_of
from inventory_sdk.stock.engine import Engine, StockSettings
from inventory_sdk.stock.stock import Stock

MERCHANT: Final = "m1"
SKU: Final = "sku-1"
TOGETHER: Final = 256
FIRST: Final = 1_000_000


@contextmanager
def server() -> Iterator[str]:
    """The URL of a redis-server that lives as long as the block."""
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("needs the redis-server program")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - the program was found by its name
        try:
            for line in process.stdout or ():
                if "Ready to accept connections" in line:
                    break
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.kill()
            process.communicate()


class Stocked:
    """All a rebuild of one SKU needs of a ledger."""

    async def balances(self, size: int) -> AsyncIterator[list[Balance]]:
        yield [Balance(key_of(MERCHANT, SKU), 10**9, 0)]

    async def reservations(self, size: int) -> AsyncIterator[list[Any]]:
        return
        yield

    async def results(self, size: int, since_ms: int) -> AsyncIterator[list[Any]]:
        return
        yield

    async def extend(self, milliseconds: int) -> None:
        return

    async def open(self) -> None:
        return


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[tuple[Any, Engine, Stock]]:
    client: Any = Redis.from_url(url, retry=Retry(NoBackoff(), 0))
    nobody: Any = None
    engine = Engine(client, nobody, StockSettings(journal_cap=0), NoMetrics(), None, None, lambda *_: None)

    async def reached(*_: Any) -> None:
        return

    try:
        await engine.upkeep.freeze(0, 1)
        await engine.upkeep.rebuild(0, 1, Stocked())
        yield client, engine, Stock(lambda: engine, merchant=MERCHANT, durability=lambda: "redis", reach=reached)
    finally:
        await engine.close()
        await client.aclose()


async def used(client: Any) -> int:
    await client.memory_purge()
    return int((await client.info("memory"))["used_memory"])


async def measured(url: str, act: Callable[[Stock, str], Any], operations: int) -> tuple[float, float, float]:
    """Bytes per operation: all but the journal, the journal, and what is left without results too."""
    async with opened(url) as (client, engine, stock):
        await act(stock, "order-0")
        before = await used(client)
        for start in range(FIRST, FIRST + operations, TOGETHER):
            calls = range(start, min(start + TOGETHER, FIRST + operations))
            receipts: list[Receipt] = await asyncio.gather(*(act(stock, f"order-{number}") for number in calls))
            assert not any(receipt.replayed for receipt in receipts)
        full = await used(client)
        await client.delete(engine.partitions[0].key("journal"))
        kept = await used(client)
        await client.delete(engine.partitions[0].key("results:0"))
        without_results = await used(client)
        await client.flushall()
    return (kept - before) / operations, (full - kept) / operations, (without_results - before) / operations


async def deduct(stock: Stock, name: str) -> Receipt:
    return await stock.deduct([Line(SKU, 1)], operation_id=name)


async def reserve(stock: Stock, name: str) -> Receipt:
    return await stock.reserve([Line(SKU, 1)], operation_id=name, ttl=86_400)


async def main(operations: int) -> None:
    with server() as url:
        per_result, per_journaled, _ = await measured(url, deduct, operations)
        per_reservation, journaled_reserve, bare = await measured(url, reserve, operations)
    print(f"{operations} of each, one line, batches of {TOGETHER}")
    print(f"a remembered deduct:    {per_result:6.1f} bytes, and {per_journaled:.1f} in the journal")
    print(
        f"a live reservation:     {per_reservation:6.1f} bytes ({bare:.1f} without its result), and {journaled_reserve:.1f} in the journal"
    )
    print(
        json.dumps(
            {
                "bytes_per_result": round(per_result, 1),
                "bytes_per_reservation": round(per_reservation, 1),
                "bytes_per_journaled": round(per_journaled, 1),
            }
        )
    )


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000))
