"""The steps of docs/tutorial/shop.md, each under the same load: the shop of the examples before, and after each change.

before       a row lock in the shop's own table
database     the methods are decorated, the database goes on selling (admission="database")
redis        the merchant was adopted: Redis sells, the journal in Redis is the queue
rabbitmq     the same with RabbitMQ, so at durability "queue"

Each turn is a process of its own on a database of its own (the user must be allowed to create one), the worker another. Callers place
orders for one product over HTTP (in the process, no sockets) and pay every second one; then they sell at the till. Steps take turns, the
median of them counts. Afterwards the shop's own tables must agree with what the callers were told.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import asyncpg
import httpx
from sqlalchemy.engine import make_url

from benchmarks.load import finish
from benchmarks.options import Options, parse
from benchmarks.stand import COMMAND, ROOT
from inventory_sdk import DurabilityNotReached
from inventory_sdk.sync.queues import from_url

TURNS: Final = 2
RATE: Final = 100
"""Orders, and till sales, of a turn for each second that was asked for."""
PATIENCE: Final = 120.0
MUG: Final = "mug"
DATABASE_LINE: Final = "    database=engine,\n"
POOL_LINE: Final = "    database=engine.url.render_as_string(hide_password=False),\n"
"""A pool of its own: a request of the shop holds a connection while the database's way needs another one."""
ADMISSION_LINE: Final = '    admission="database",\n'
QUEUE_LINE: Final = '    queue=os.environ["SHOP_QUEUE_URL"],\n'


class Step(NamedTuple):
    """An example, the lines that its ``Inventory`` gets beside its own, and whether the merchant is adopted."""

    name: str
    example: str
    lines: str = ""
    adopt: bool = False


STEPS: Final = (
    Step("before", "shop_before"),
    Step("database", "shop_after", POOL_LINE + ADMISSION_LINE),
    Step("redis", "shop_after", POOL_LINE + ADMISSION_LINE, adopt=True),
    Step("rabbitmq", "shop_after", POOL_LINE + ADMISSION_LINE + QUEUE_LINE, adopt=True),
)


# One turn, in a process of its own -----------------------------------------------------------------------------------------------------


async def _called(client: httpx.AsyncClient, calls: int, at_once: int, call: Callable[[int], Coroutine[Any, Any, int]]) -> dict[str, Any]:
    """``call`` answers a status; each caller calls again as soon as it was answered."""
    waiting = iter(range(calls))
    seconds: list[float] = []
    failed = 0

    async def caller() -> None:
        nonlocal failed
        for number in waiting:
            began = time.perf_counter()
            status = await call(number)
            seconds.append(time.perf_counter() - began)
            failed += status >= 300

    began, spent = time.perf_counter(), time.process_time()
    await asyncio.gather(*[caller() for _ in range(at_once)])
    took, spent = time.perf_counter() - began, time.process_time() - spent
    ordered = sorted(seconds)
    return {
        "per_s": round(calls / took, 1),
        "p50_ms": round(ordered[calls // 2] * 1000, 1),
        "p99_ms": round(ordered[calls * 99 // 100] * 1000, 1),
        "cpu_ms": round(spent / calls * 1000, 2),
        "failed": failed,
    }


async def _turn(calls: int, at_once: int, with_sdk: bool, adopt: bool) -> dict[str, Any]:
    """Load on the shop that stands in the working directory."""
    sys.path.insert(0, os.getcwd())
    from shop.api import app  # type: ignore[import-not-found]
    from shop.database import engine, sessions  # type: ignore[import-not-found]
    from shop.models import Base, Paper, Product, Stock  # type: ignore[import-not-found]
    from sqlalchemy import func, select

    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with sessions() as session, session.begin():
        session.add(Product(id=MUG, name="Mug", cents=1200))
        await session.flush()
        session.add(Stock(product_id=MUG, available=10**6))

    async def items(path: str, name: str) -> int:
        answer = await client.post(path, json={"id": name, "items": [{"product_id": MUG, "quantity": 1}]})
        return answer.status_code

    async def order(number: int) -> int:
        status = await items("/orders", f"o{number}")
        if status == 201 and number % 2:
            status = (await client.post(f"/orders/o{number}/pay")).status_code
        return status

    async with AsyncExitStack() as stack:
        inventory = await stack.enter_async_context(_selling(adopt)) if with_sdk else None
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://shop", timeout=60))
        await _called(client, at_once, at_once, lambda number: order(-2 * number - 2))  # connections, caches, the opening balance
        result = {"orders": await _called(client, calls, at_once, order)}
        result["till"] = await _called(client, calls, at_once, lambda number: items("/sales", f"s{number}"))
        began, papers = time.perf_counter(), 0
        while papers < calls and time.perf_counter() - began < PATIENCE:
            async with sessions() as session:
                papers = await session.scalar(select(func.count()).select_from(Paper).where(Paper.kind == "sale"))
            await asyncio.sleep(0.05)
        result["papers_after_s"] = round(time.perf_counter() - began, 2)
        wrong = [] if papers == calls else [f"{papers} papers for {calls} sales"]
        if inventory is not None:
            await inventory.settled(timeout=PATIENCE)
            wrong += await inventory.ledger.verify()
        async with sessions() as session:
            row = await session.get_one(Stock, MUG)
        found = row.available, row.reserved, row.sold
    sold = calls // 2 + calls
    reserved = calls - calls // 2 + at_once
    if found != (10**6 - sold - reserved, reserved, sold):
        wrong.append(f"the shop's table has {found}; {reserved} are reserved and {sold} sold")
    await engine.dispose()
    return {**result, "wrong": wrong}


@asynccontextmanager
async def _selling(adopt: bool) -> AsyncIterator[Any]:
    """The shop's inventory, started, its worker running."""
    from shop.inventory import inventory  # type: ignore[import-not-found]

    async with inventory:
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-c", COMMAND, "worker", "shop.stock:inventory", "--log-level", "WARNING"
        )
        try:
            for _ in range(200):
                try:
                    await inventory.settled(timeout=5.0)
                    break
                except DurabilityNotReached:
                    await asyncio.sleep(0.1)
            if adopt:
                await inventory.stock.adopt("default")
            yield inventory
        finally:
            worker.send_signal(signal.SIGTERM)
            await worker.wait()


# All turns -----------------------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _database(server: str, name: str) -> AsyncIterator[str]:
    url = make_url(server)
    connection = await asyncpg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        await connection.execute(f'CREATE DATABASE "{name}"')
        try:
            yield url.set(database=name).render_as_string(hide_password=False)
        finally:
            await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        await connection.close()


def _edit(module: Path, lines: str) -> None:
    code = module.read_text()
    if code.count(DATABASE_LINE) != 1:
        raise RuntimeError("the example's Inventory has changed; this benchmark goes by what it was")
    module.write_text(code.replace(DATABASE_LINE, lines))


async def _run(step: Step, options: Options, name: str) -> dict[str, Any]:
    """One turn of a step, on everything of its own."""
    from redis.asyncio import Redis

    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "examples" / step.example / "shop", Path(folder, "shop"), ignore=shutil.ignore_patterns("__pycache__"))
        if step.lines:
            _edit(Path(folder, "shop", "inventory.py"), step.lines)
        async with _database(options.database, name) as database:
            variables = {
                "SHOP_DATABASE_URL": database,
                "SHOP_REDIS_URL": options.redis,
                "SHOP_QUEUE_URL": options.queue,
                "SHOP_NAMESPACE": name,
                "PYTHONPATH": str(ROOT),
            }
            environment = {**os.environ, **variables}
            if step.lines:
                schema = (sys.executable, "-c", COMMAND, "schema", "--database", database)
                made = await asyncio.create_subprocess_exec(*schema, env=environment, stdout=asyncio.subprocess.DEVNULL)
                if await made.wait():
                    raise RuntimeError(f"{step.name}: no schema")
            asked = {"calls": round(options.seconds * RATE), "at_once": options.callers[0]}
            asked |= {"with_sdk": bool(step.lines), "adopt": step.adopt}
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "benchmarks.tutorial", "--turn", json.dumps(asked)),
                cwd=folder,
                env=environment,
                stdout=asyncio.subprocess.PIPE,
            )
            try:
                said, _ = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
                async with Redis.from_url(options.redis) as client:
                    async for key in client.scan_iter(match=f"{{{name}:*", count=1000):
                        await client.unlink(key)
                if QUEUE_LINE in step.lines:
                    queue = from_url(options.queue, name)
                    await queue.delete(0)
                    await queue.close()
        if process.returncode:
            raise RuntimeError(f"{step.name}: ended with {process.returncode}")
        result: dict[str, Any] = json.loads(said.splitlines()[-1])
        return result


def _middle(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure."""
    merged: dict[str, Any] = {}
    for part in ("orders", "till"):
        merged[part] = {figure: median(turn[part][figure] for turn in turns) for figure in turns[0][part]}
    return {**merged, "papers_after_s": median(turn["papers_after_s"] for turn in turns)}


async def main(options: Options) -> None:
    """Every step, in turns."""
    taken: dict[str, list[dict[str, Any]]] = {step.name: [] for step in STEPS}
    wrong: list[str] = []
    for turn in range(TURNS):
        for step in STEPS:
            found = await _run(step, options, re.sub(r"\W", "", f"{options.name}{step.name}{turn}"))
            wrong += [f"{step.name}: {each}" for each in found.pop("wrong")]
            failed = found["orders"]["failed"] + found["till"]["failed"]
            wrong += [f"{step.name}: {failed} calls failed"] if failed else []
            taken[step.name].append(found)
            for part in ("orders", "till"):
                shown = found[part]
                line = f"{shown['per_s']:>8,.0f}/s   p50 {shown['p50_ms']:>8.1f} ms   p99 {shown['p99_ms']:>8.1f} ms"
                print(f"{step.name:<10} {part:<8} {line}   CPU {shown['cpu_ms']:.2f} ms each", flush=True)
    result: dict[str, Any] = {"benchmark": "tutorial", "callers": options.callers[0], "calls": round(options.seconds * RATE)}
    finish(result | {name: _middle(turns) for name, turns in taken.items()}, wrong)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--turn"]:
        print(json.dumps(asyncio.run(_turn(**json.loads(sys.argv[2])))), flush=True)
    else:
        asyncio.run(main(parse(__doc__, callers="64")))
