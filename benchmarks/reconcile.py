"""Comparing a million SKUs while they are sold: how long it takes, and what the buyers notice.

    python -m benchmarks.reconcile [--skus 1000000] [--rate 20000] [--callers 16] [--pause 0.02] [--seconds 15]

Redis and PostgreSQL as given (``--redis``, ``--database``), the journal as queue; the worker and the comparison run in processes of
their own. Callers buy one unit of a SKU at random, again ``--pause`` seconds after they were answered: first alone, then while the
SKUs are compared, then while the ledger's own books are. Afterwards a drift in the middle must be found, and only that. The last line
is one JSON object:

    {"skus": …, "rate": …, "seconds_skus": …, "seconds_books": …, "alone": {…}, "comparing": {…}, "books": {…}, "found": 1, "wrong": […]}
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import random
import sys
import time
import uuid
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.load import Load, finish, report
from benchmarks.options import DATABASE, REDIS
from benchmarks.stand import MERCHANT, ROOT, WORKER
from inventory_sdk import DurabilityNotReached, Inventory, Line
from inventory_sdk.ledger.protocol import Entering
from inventory_sdk.model import fingerprint, key_of
from inventory_sdk.stock.partition import KEY_NAMES

COMPARER: Final = (sys.executable, "-m", "benchmarks.reconcile", "--compare")
UNITS: Final = 1000
CHUNK: Final = 5000


async def fill(inventory: Inventory, skus: int) -> None:
    """Stock through the ledger; Redis gets it all with a rebuild, which is quicker than a credit for each."""
    ledger = inventory.ledger
    for start in range(0, skus, CHUNK):
        flat = [part for number in range(start, min(start + CHUNK, skus)) for part in (key_of(MERCHANT, f"sku-{number:07}"), UNITS)]
        mark = fingerprint("restock", "", ["+", *flat])
        await ledger.enter(0, 1, [Entering("restock", key_of(MERCHANT, f"po-{start}"), mark, tuple(flat))])
    await inventory._running().client.delete(inventory._running().engine.partitions[0].key("meta"))


async def sell(inventory: Inventory, given: argparse.Namespace, until: asyncio.Event) -> Load:
    """Buyers until the event; the first error of any of them is raised."""
    latencies = array("d")
    dice = random.Random(7)

    async def buyer(number: int) -> None:
        count = 0
        await asyncio.sleep(dice.random() * given.pause)
        while not until.is_set():
            count += 1
            line = [Line(f"sku-{dice.randrange(given.skus):07}", 1)]
            began = time.perf_counter()
            await inventory.stock.deduct(line, operation_id=f"{number}-{uuid.uuid4().hex[:12]}-{count}")
            latencies.append(time.perf_counter() - began)
            await asyncio.sleep(given.pause)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(given.callers):
            group.create_task(buyer(number))
    ordered = sorted(latencies)
    p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    return Load(len(ordered), time.perf_counter() - started, p50 * 1000, p99 * 1000)


async def beside(inventory: Inventory, given: argparse.Namespace, what: str) -> tuple[Load, dict[str, Any]]:
    """Sales while another process compares, and what that says."""
    process = await asyncio.create_subprocess_exec(*COMPARER, what, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    done = asyncio.Event()

    async def wait() -> bytes:
        assert process.stdout is not None
        try:
            ready = await process.stdout.readline()  # its imports are no part of it
            assert ready
            return await process.stdout.read()
        finally:
            done.set()

    load, said = await asyncio.gather(sell(inventory, given, done), wait())
    if await process.wait():
        raise RuntimeError(f"comparing failed: {said!r}")
    return load, dict(json.loads(said))


async def measure(given: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Fill, sell alone, sell while it is compared, and look for one drift."""
    shop = importlib.import_module("benchmarks.shop")
    inventory: Inventory = shop.inventory
    result: dict[str, Any] = {"skus": given.skus, "rate": given.rate}
    wrong: list[str] = []
    async with inventory:
        await inventory.create_schema()
        print(f"filling {given.skus:,} SKUs …", flush=True)
        await fill(inventory, given.skus)
        async with worker():
            await awake(inventory, given.skus)
            alone = asyncio.Event()
            asyncio.get_running_loop().call_later(given.seconds, alone.set)
            loads = {"alone": await sell(inventory, given, alone)}
            report("sales alone", loads["alone"])
            for name, what in (("comparing", "skus"), ("books", "books")):
                loads[name], said = await beside(inventory, given, what)
                report(f"sales while {name}", loads[name], f"{said['seconds']:.1f} s")
                result[f"seconds_{what}"] = round(said["seconds"], 1)
                wrong += said["wrong"]
            result |= {name: load.figures() for name, load in loads.items()}
            field = key_of(MERCHANT, f"sku-{given.skus // 2:07}")
            client: Any = inventory._running().client
            await client.hincrby(inventory._running().engine.partitions[0].key("available"), field, 1)
            found = (await inventory.reconciler.run(merchant=MERCHANT)).open
            result["found"] = len(found)
            if [(each.name, each.available) for each in found] != [(field, 1)]:
                wrong.append(f"one drift was made, {found} was found")
            await inventory.settled(timeout=300)
    return result, wrong


async def compare(what: str) -> None:
    """In a process of its own: prints a line when it begins, and what it came to."""
    inventory: Inventory = importlib.import_module("benchmarks.shop").inventory
    async with inventory:
        print("begins", flush=True)
        began = time.perf_counter()
        if what == "skus":
            done = await inventory.reconciler.run(merchant=MERCHANT)
            wrong = [str(each) for each in done.open[:5]]
        else:
            wrong = await inventory.ledger.verify()
        print(json.dumps({"seconds": time.perf_counter() - began, "wrong": wrong}))


@asynccontextmanager
async def worker() -> AsyncIterator[None]:
    """As users run it."""
    process = await asyncio.create_subprocess_exec(*WORKER, cwd=ROOT)
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


async def awake(inventory: Inventory, skus: int) -> None:
    """Until the worker has filled Redis from the ledger and has applied a first sale."""
    partition = inventory._running().engine.partitions[0]
    client: Any = inventory._running().client
    while (await partition.hello()).state != "open" or await client.hlen(partition.key("available")) < skus:
        await asyncio.sleep(0.2)
    await inventory.stock.deduct([Line("sku-0000000", 1)], operation_id="first")
    while True:
        try:
            return await inventory.settled(timeout=10)
        except DurabilityNotReached:
            await asyncio.sleep(0.2)


async def remove(given: argparse.Namespace, name: str) -> None:
    """Everything that it made."""
    ledger: Any = importlib.import_module("benchmarks.shop").inventory.ledger
    engine = create_async_engine(given.database)
    async with engine.begin() as connection:
        await connection.run_sync(ledger.tables.metadata.drop_all)
    await engine.dispose()
    client = Redis.from_url(given.redis)
    await client.unlink(*(f"{{{name}:0}}:{key}" for key in (*KEY_NAMES, "admission", "worker")))
    await client.aclose()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--compare", choices=("skus", "books"), help=argparse.SUPPRESS)
    parser.add_argument("--redis", default=os.environ.get("INVENTORY_TEST_REDIS_URL", REDIS))
    parser.add_argument("--database", default=os.environ.get("INVENTORY_TEST_POSTGRESQL_URL", DATABASE))
    parser.add_argument("--skus", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=20_000)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--pause", type=float, default=0.02)
    parser.add_argument("--seconds", type=float, default=15.0)
    given = parser.parse_args()
    if given.compare:
        asyncio.run(compare(given.compare))
        return
    name = f"b{uuid.uuid4().hex[:10]}"
    os.environ |= {"INVENTORY_REDIS_URL": given.redis, "INVENTORY_DATABASE_URL": given.database, "INVENTORY_BENCH_NAME": name}
    os.environ["INVENTORY_BENCH_RATE"] = str(given.rate)
    os.environ.pop("INVENTORY_QUEUE_URL", None)

    async def whole() -> tuple[dict[str, Any], list[str]]:
        try:
            return await measure(given)
        finally:
            await remove(given, name)

    finish(*asyncio.run(whole()))


if __name__ == "__main__":
    main()
