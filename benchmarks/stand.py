"""Ours under load: an Inventory on Redis, RabbitMQ and PostgreSQL in this process, its worker in a second one, and its books."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from redis.asyncio import Redis
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.load import Call, Load, put
from benchmarks.options import Options
from inventory_sdk import DurabilityNotReached, Inventory, Line
from inventory_sdk.model import key_of
from inventory_sdk.sync.queues import from_url

MERCHANT: Final = "default"
SKU: Final = "hot"
UNITS: Final = 10**9
COMMAND: Final = "from inventory_sdk.cli import main; main()"
ROOT: Final = Path(__file__).resolve().parent.parent
WORKER: Final = (sys.executable, "-c", COMMAND, "worker", "benchmarks.shop:inventory", "--log-level", "WARNING")
PATIENCE: Final = 300.0
"""Seconds that the ledger gets to catch up."""


@dataclass(frozen=True, slots=True)
class Durable:
    """What the callers saw, and the seconds until everything they were promised was in PostgreSQL."""

    load: Load
    settled: float

    @property
    def tps(self) -> float:
        """Operations per second, until the last of them was in PostgreSQL."""
        return self.load.operations / self.settled


class Stand:
    """One hot SKU. ``sold`` counts what was accepted, over all loads."""

    def __init__(self, inventory: Inventory, worker_pid: int) -> None:
        self.inventory = inventory
        self.worker_pid = worker_pid
        self.sold = 0
        self._numbers = count()

    def selling(self, durability: Any) -> Call:
        """Sells one unit under an id of its own; the line is made once, as a service would keep one per SKU."""
        deduct, numbers, lines = self.inventory.stock.deduct, self._numbers, [Line(SKU, 1)]

        async def call() -> None:
            await deduct(lines, operation_id=f"order-{next(numbers)}", durability=durability)
            self.sold += 1

        return call

    async def durable(self, call: Call, callers: int, seconds: float) -> Durable:
        """Load, then wait for the ledger: both from the same start."""
        await self.settle()
        started = time.perf_counter()
        load = await put(call, callers, seconds)
        await self.settle()
        return Durable(load, time.perf_counter() - started)

    async def accepted(self, call: Call, callers: int, seconds: float) -> Load:
        """Load with the worker stopped, so that it takes no part of the CPU; afterwards it applies what was journaled."""
        await self.settle()
        os.kill(self.worker_pid, signal.SIGSTOP)
        try:
            return await put(call, callers, seconds)
        finally:
            os.kill(self.worker_pid, signal.SIGCONT)
            await asyncio.sleep(1.0)  # until it has given a sign again
            await self.settle()

    async def settle(self) -> None:
        """Until the ledger has applied everything."""
        await self.inventory.settled(timeout=PATIENCE)

    async def check(self) -> list[str]:
        """Redis, ledger, and what the callers counted, to the unit; and the ledger's own books."""
        await self.settle()
        wrong = []
        level = await self.inventory.stock.level(SKU)
        (row,) = await self.inventory.ledger.stock([key_of(MERCHANT, SKU)])
        left = UNITS - self.sold
        if not level.available == row.available == left or row.sold != self.sold or row.supplied != UNITS:
            wrong.append(f"{self.sold} sold, so {left} left; Redis says {level.available}, the ledger {row}")
        return wrong + await self.inventory.ledger.verify()


@asynccontextmanager
async def stand(options: Options, writes: str = "none", *, part: str = "ours") -> AsyncIterator[tuple[Stand, ModuleType]]:
    """The service ``benchmarks.shop``, stocked, its worker running. Everything it made is removed afterwards."""
    name = f"{options.name}{part}"
    variables = {
        "INVENTORY_REDIS_URL": options.redis,
        "INVENTORY_QUEUE_URL": options.queue,
        "INVENTORY_DATABASE_URL": options.database,
        "INVENTORY_BENCH_NAME": name,
        "INVENTORY_BENCH_WRITES": writes,
    }
    os.environ.update(variables)
    sys.modules.pop("benchmarks.shop", None)
    shop = importlib.import_module("benchmarks.shop")
    inventory = shop.inventory
    try:
        async with inventory:
            await _tables(options.database, shop.tables, make=True)
            await inventory.create_schema()
            async with _worker() as pid:
                await inventory.stock.restock([Line(SKU, UNITS)], operation_id="opening")
                await _awake(inventory)
                yield Stand(inventory, pid), shop
    finally:
        await _remove(options, name, inventory, shop)


@asynccontextmanager
async def alone(options: Options) -> AsyncIterator[Stand]:
    """The same SKU on Redis alone (``queue=None``: the journal is the queue), for one caller. No worker runs meanwhile."""
    name = f"{options.name}alone"
    inventory = Inventory(options.redis, database=options.database, namespace=name, table_prefix=f"{name}_", merchant=MERCHANT)
    try:
        async with inventory:
            await inventory.create_schema()
            await inventory.stock.restock([Line(SKU, UNITS)], operation_id="opening")
            yield Stand(inventory, 0)
    finally:
        ledger: Any = inventory.ledger
        await _tables(options.database, ledger.tables.metadata, make=False)
        await _delete_keys(options.redis, name)


@asynccontextmanager
async def _worker() -> AsyncIterator[int]:
    """The worker as users run it."""
    process = await asyncio.create_subprocess_exec(*WORKER, cwd=ROOT)
    try:
        yield process.pid
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(30):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _awake(inventory: Inventory) -> None:
    """Until the worker has applied the first entry."""
    for _ in range(200):
        try:
            return await inventory.settled(timeout=5.0)
        except DurabilityNotReached:
            await asyncio.sleep(0.1)
    raise RuntimeError("the worker did not come up; its messages are above")


async def _tables(database: str, metadata: MetaData, *, make: bool) -> None:
    engine = create_async_engine(database)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all if make else metadata.drop_all)
    finally:
        await engine.dispose()


async def _remove(options: Options, name: str, inventory: Inventory, shop: ModuleType) -> None:
    """Each step is tried, whatever became of the others; then the first error is raised."""
    ledger: Any = inventory.ledger
    steps = [
        _tables(options.database, ledger.tables.metadata, make=False),
        _tables(options.database, shop.tables, make=False),
        _delete_queue(options.queue, name),
        _delete_keys(options.redis, name),
    ]
    for outcome in await asyncio.gather(*steps, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def _delete_queue(url: str, name: str) -> None:
    queue = from_url(url, name)
    await queue.start()
    try:
        await queue.delete(0)
    finally:
        await queue.close()


async def _delete_keys(url: str, name: str) -> None:
    client = Redis.from_url(url)
    try:
        async for key in client.scan_iter(match=f"{{{name}:*", count=1000):
            await client.unlink(key)
    finally:
        await client.aclose()
