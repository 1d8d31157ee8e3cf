"""The constants of docs/explanation/capacity.md: what one more operation, SKU, process and partition costs.

script        microseconds in Redis of a batch, as fixed part and part per operation
sku           bytes in Redis of a SKU
rest          with 1 and 4 partitions: connections of a caller's process and of a worker, what both ask of Redis and PostgreSQL at rest
load          with 1, 16 and 256 callers: CPU microseconds per operation of this process and of one worker, and of two workers
behind        a worker that catches up with what was journaled while it stood still: by 256 callers in large batches, and by 64 in a lane
              each, so that each operation is a script call, an entry and a message of its own, as if each caller were a process
ledger        rows and bytes of an operation in PostgreSQL

Redis is a server of its own; PostgreSQL gets a database of its own (the user must be allowed to create one). Processes are seen through
/proc, so it needs Linux. CPU time is what to read: the machine's own rate depends on what else runs.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from math import inf
from pathlib import Path
from statistics import linear_regression, median
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg
from redis.asyncio import Redis
from sqlalchemy.engine import make_url

from benchmarks.cpu import Spent
from benchmarks.load import finish, put
from benchmarks.memory import MERCHANT, Stocked, deduct, opened, server, used
from benchmarks.options import Options, parse
from benchmarks.stand import ROOT, WORKER
from inventory_sdk import DurabilityNotReached, Inventory, Lane, Line
from inventory_sdk.ledger.protocol import Balance
from inventory_sdk.model import key_of
from inventory_sdk.sync.queues import from_url

BATCHES: Final = (1, 8, 32, 128)
ROUNDS: Final = 300
SKUS: Final = 100_000
LOADS: Final = (1, 16, 256)
APART: Final = 64
REST: Final = 5.0
PARTITIONS: Final = (1, 4)
UNITS: Final = 10**9
LANES: Final = {f"l{number}": Lane(timeout=inf) for number in range(APART)}


# Redis alone ---------------------------------------------------------------------------------------------------------------------------


async def script(url: str) -> dict[str, Any]:
    """Microseconds of a script call in Redis, by operations in it: the median, since Redis may be put aside by the machine; and the
    line through them."""
    points: list[tuple[int, float]] = []
    async with opened(url) as (client, _, stock):

        async def counted() -> tuple[int, int]:
            stat = (await client.info("commandstats"))["cmdstat_evalsha"]
            return stat["calls"], stat["usec"]

        for size in BATCHES:
            await asyncio.gather(*(deduct(stock, f"warm-{size}-{each}") for each in range(size)))
            took: list[int] = []
            before = await counted()
            for round_ in range(ROUNDS):
                await asyncio.gather(*(deduct(stock, f"o-{size}-{round_}-{each}") for each in range(size)))
                after = await counted()
                if after[0] == before[0] + 1:
                    took.append(after[1] - before[1])
                before = after
            points.append((size, median(took)))
        await client.flushall()
    slope, fixed = linear_regression(*zip(*points, strict=True))
    return {"us_per_call": dict(points), "fixed_us": round(fixed, 1), "us_per_operation": round(slope, 2)}


class ManySkus(Stocked):
    """A ledger of ``SKUS``, for a rebuild."""

    async def balances(self, size: int) -> AsyncIterator[list[Balance]]:
        for start in range(0, SKUS, size):
            yield [Balance(key_of(MERCHANT, f"sku-{number:07}"), 1000, 10) for number in range(start, min(start + size, SKUS))]


async def sku(url: str) -> float:
    """Bytes per SKU: its fields in ``available`` and ``reserved``."""
    async with opened(url) as (client, engine, _):
        before = await used(client)
        await engine.upkeep.freeze(0, 2)
        await engine.upkeep.rebuild(0, 2, ManySkus())
        after = await used(client)
        await client.flushall()
    return round((after - before) / SKUS, 1)


# A deployment --------------------------------------------------------------------------------------------------------------------------


def connections(pid: int, ports: dict[int, str]) -> dict[str, int]:
    """Established TCP connections of a process, by what listens at the other end."""
    inodes = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(each)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found: Counter[str] = Counter(dict.fromkeys(ports.values(), 0))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            port = int(fields[2].rpartition(":")[2], 16)
            if fields[3] == "01" and fields[9] in inodes and port in ports:
                found[ports[port]] += 1
    return dict(found)


def resident(pid: int) -> float:
    """Megabytes of a process in memory."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return round(int(line.split()[1]) / 1024, 1)


@asynccontextmanager
async def database(url: str, name: str) -> AsyncIterator[tuple[str, Any]]:
    """The URL of a new database, and a connection to it for statistics."""
    made = make_url(url)
    admin = await asyncpg.connect(made.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        try:
            yield made.set(database=name).render_as_string(hide_password=False), admin
        finally:
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


@asynccontextmanager
async def workers(count: int) -> AsyncIterator[list[int]]:
    """Their process ids. They find servers and names in the environment."""
    started = [await asyncio.create_subprocess_exec(*WORKER, cwd=ROOT) for _ in range(count)]
    try:
        yield [process.pid for process in started]
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            await process.wait()


async def awake(inventory: Inventory) -> None:
    """Until the ledger has everything; a worker may still be starting."""
    for _ in range(300):
        try:
            return await inventory.settled(timeout=5.0)
        except DurabilityNotReached:
            await asyncio.sleep(0.1)
    raise RuntimeError("no worker came up; its messages are above")


class Deployment:
    """One caller's process (this one) on servers of its own, as ``benchmarks.shop`` has it."""

    def __init__(self, options: Options, redis: str, ledger: str, admin: Any, partitions: int) -> None:
        self.name = f"{options.name}p{partitions}"
        self.options, self.redis, self.ledger, self.admin, self.partitions = options, redis, ledger, admin, partitions
        os.environ |= {
            "INVENTORY_REDIS_URL": redis,
            "INVENTORY_QUEUE_URL": options.queue,
            "INVENTORY_DATABASE_URL": ledger,
            "INVENTORY_PARTITIONS": str(partitions),
            "INVENTORY_BENCH_NAME": self.name,
            "INVENTORY_BENCH_WRITES": "none",
        }
        self.inventory = Inventory.from_env(namespace=self.name, table_prefix=f"{self.name}_", metrics=[], lanes=LANES)
        places = [(redis, 6379, "redis"), (options.queue, 5672, "rabbitmq"), (ledger, 5432, "postgresql")]
        self.ports = {urlsplit(url).port or usual: what for url, usual, what in places}
        self.sold = 0

    async def counted(self) -> tuple[int, int]:
        """Commands that Redis has executed, transactions that PostgreSQL has ended (one that only read ends in a rollback)."""
        async with Redis.from_url(self.redis) as client:
            commands = (await client.info("stats"))["total_commands_processed"]
        name = make_url(self.ledger).database
        # A backend hands its numbers over now and then, at the latest a second after it has gone idle.
        return commands, await self.admin.fetchval("SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = $1", name)

    async def at_rest(self) -> dict[str, Any]:
        """With one worker and nothing to do."""
        async with self.inventory, workers(1) as (worker,):
            for number in range(8 * self.partitions):  # so that every partition has something to apply
                await self.inventory.stock.restock([Line("a", 1)], merchant=f"m{number}", operation_id="opening")
            await awake(self.inventory)
            await asyncio.sleep(2.0)
            before, spent = await self.counted(), Spent({os.getpid(): "caller", worker: "worker"})
            await asyncio.sleep(REST)
            after, cpu = await self.counted(), spent.seconds()
            return {
                "caller_connections": connections(os.getpid(), self.ports),
                "worker_connections": connections(worker, self.ports),
                "redis_commands_per_s": round((after[0] - before[0]) / REST, 1),
                "postgresql_transactions_per_s": round((after[1] - before[1]) / REST, 1),
                "worker_cpu_percent": round(cpu["worker"] / REST * 100, 1),
                "worker_mb": resident(worker),
                "caller_mb": resident(os.getpid()),
            }

    async def load(self, callers: int, count: int, *, apart: bool = False, behind: bool = False) -> dict[str, Any]:
        """CPU microseconds per operation, until the ledger has everything. ``behind``: the workers stand still until it is journaled."""
        lines, number, doors = [Line("hot", 1)], 0, itertools.cycle(LANES)

        async def call() -> None:
            nonlocal number
            number += 1
            name = f"{callers}-{count}-{behind}-{number}"
            async with self.inventory.lanes.enter(next(doors)) if apart else nullcontext():
                await self.inventory.stock.deduct(lines, operation_id=name, durability="redis")
            self.sold += 1

        async with workers(count) as pids:
            await awake(self.inventory)
            await put(call, callers, 0.5)
            await awake(self.inventory)
            parts = {os.getpid(): "caller"} | dict.fromkeys(pids, "worker")
            spent, started = Spent(parts), time.perf_counter()
            for pid in pids if behind else ():
                os.kill(pid, signal.SIGSTOP)
            measured = await put(call, callers, self.options.seconds)
            for pid in pids if behind else ():
                os.kill(pid, signal.SIGCONT)
            under_load = connections(os.getpid(), self.ports)
            await awake(self.inventory)
            took, cpu = time.perf_counter() - started, spent.seconds()
        micros = {part: round(cpu[part] / measured.operations * 1e6, 1) for part in ("caller", "worker")}
        what = f"{callers} callers{' apart' if apart else ''}, {count} workers{' behind' if behind else ''}"
        print(f"{what}: {measured.operations / took:,.0f}/s in PostgreSQL, CPU {micros}", flush=True)
        return {"durable_tps": round(measured.operations / took), "cpu_us": micros, "caller_connections": under_load}

    async def rows(self) -> dict[str, Any]:
        """What an operation has left in PostgreSQL."""
        connection = await asyncpg.connect(make_url(self.ledger).set(drivername="postgresql").render_as_string(hide_password=False))
        try:
            await connection.execute("VACUUM ANALYZE")
            found, size = {}, 0
            for table in ("entry", "operation", "change"):
                full = f"{self.name}_{table}"
                found[table] = await connection.fetchval(f"SELECT count(*) FROM {full}")  # noqa: S608 - a name of our own
                size += await connection.fetchval("SELECT pg_total_relation_size($1::regclass)", full)
        finally:
            await connection.close()
        each = {f"{table}_rows": round(count / found["operation"], 3) for table, count in found.items()}
        return {"operations": found["operation"], **each, "bytes_per_operation": round(size / found["operation"])}

    async def check(self) -> list[str]:
        """The books."""
        (row,) = await self.inventory.ledger.stock([key_of("default", "hot")])
        level = await self.inventory.stock.level("hot")
        wrong = [] if row.sold == self.sold and level.available == UNITS - self.sold else [f"{self.sold} sold; Redis {level}, ledger {row}"]
        return wrong + await self.inventory.ledger.verify()

    async def remove_queues(self) -> None:
        """Only RabbitMQ is shared with others."""
        queue = from_url(self.options.queue, self.name)
        for partition in range(self.partitions):
            await queue.delete(partition)
        await queue.close()


async def deployment(options: Options, redis: str, partitions: int, result: dict[str, Any]) -> list[str]:
    """At rest for every number of partitions, under load for one."""
    async with database(options.database, f"{options.name}p{partitions}") as (ledger, admin):
        one = Deployment(options, redis, ledger, admin, partitions)
        try:
            async with one.inventory:
                await one.inventory.create_schema()
            result[f"rest_{partitions}_partitions"] = await one.at_rest()
            if partitions > 1:
                return []
            async with one.inventory:
                async with workers(1):
                    await awake(one.inventory)
                    await one.inventory.stock.restock([Line("hot", UNITS)], operation_id="opening")
                loads: Sequence[tuple[int, int]] = [*((callers, 1) for callers in LOADS), (LOADS[-1], 2)]
                for callers, count in loads:
                    result[f"load_{callers}_callers_{count}_workers"] = await one.load(callers, count)
                result["ledger"] = await one.rows()
                result["behind_large_batches"] = await one.load(LOADS[-1], 1, behind=True)
                result["behind_one_by_one"] = await one.load(APART, 1, apart=True, behind=True)
                return await one.check()
        finally:
            await one.remove_queues()


async def main(options: Options) -> None:
    """Redis alone, then deployments."""
    result: dict[str, Any] = {"benchmark": "capacity", "seconds": options.seconds}
    wrong: list[str] = []
    with server() as redis:
        result["script"] = await script(redis)
        result["bytes_per_sku"] = await sku(redis)
        for what in ("script", "bytes_per_sku"):
            print(f"{what}: {result[what]}", flush=True)
        for partitions in PARTITIONS:
            wrong += await deployment(options, redis, partitions, result)
            print(f"at rest, {partitions} partitions: {result[f'rest_{partitions}_partitions']}", flush=True)
    finish(result, wrong)


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("capacity reads /proc: it needs Linux")
    asyncio.run(main(parse(__doc__)))
