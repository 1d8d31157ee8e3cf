"""The stand: servers behind proxies, processes that sell, processes that apply, and a hand that breaks them by a seeded schedule."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from sqlalchemy.ext.asyncio import create_async_engine

from inventory_sdk import Inventory, Line
from inventory_sdk.errors import InventoryError
from inventory_sdk.ledger.schema import tables
from inventory_sdk.sync.queues import from_url
from tests.faults.auditor import Books, Report, against_redis, audit, read_books, read_callers
from tests.faults.proxy import Proxy

ROOT: Final = Path(__file__).resolve().parents[2]
SECONDS: Final = float(os.environ.get("INVENTORY_TEST_FAULT_SECONDS", "1.5"))
"""How long each test goes on breaking things."""
SEED: Final = os.environ.get("INVENTORY_TEST_FAULT_SEED")
"""Replays a schedule; none: a new one each time."""
MERCHANTS: Final = ("m1", "m2", "m3")
PARTITIONS: Final = 2
PATIENCE: Final = 60.0
"""Seconds that everything gets to come to rest."""
SCARCE: Final = 400
ACTS: Final = {"deduct": 5, "reserve": 3, "brief": 1, "restock": 0.5}
LEVELS: Final = ("redis", "queue", "queue", "queue", "queue", "database")


@dataclass(frozen=True)
class Step:
    """One fault: when (seconds from the start), which, and two draws for its choice of victim and length."""

    at: float
    fault: str
    victim: float
    length: float


def schedule(seed: int, faults: Sequence[str], seconds: float, gap: float = 0.7) -> list[Step]:
    """The same for the same arguments, whatever the processes do meanwhile."""
    chance = random.Random(seed)
    steps: list[Step] = []
    at = chance.uniform(0.1, 0.4)
    while at < seconds or not steps:
        steps.append(Step(at, chance.choice(faults), chance.random(), chance.random()))
        at += chance.uniform(0.5 * gap, 1.5 * gap)
    return steps


@dataclass
class Process:
    """A caller or a worker; ``command`` starts it again."""

    command: list[str]
    log: Path
    environment: Mapping[str, str]
    running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        if self.running is not None and self.running.poll() is None:
            self.running.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        if self.running is not None:
            self.running.wait()

    async def stop(self, seconds: float) -> None:
        """SIGTERM, and the time to end what is under way."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        running = self.running
        if running is not None:
            try:
                async with asyncio.timeout(seconds):
                    while running.poll() is None:
                        await asyncio.sleep(0.02)
            except TimeoutError:
                self.kill()
                raise AssertionError(f"did not end within {seconds:g} s: {self.command}\n{self.tail()}") from None

    def tail(self) -> str:
        return self.log.read_text()[-3000:]


@dataclass
class Stand:
    """One shop under attack. ``redis``, ``queue``, ``database`` are the proxies in front of the servers."""

    inventory: Inventory
    folder: Path
    environment: dict[str, str]
    redis: Proxy
    queue: Proxy | None
    database: Proxy
    direct: str
    """The database past its proxy, for the audit."""
    prefix: str
    seed: int
    skus: dict[str, int] = field(default_factory=lambda: {"scarce": 2, "ample": 3})
    levels: Sequence[str] = LEVELS
    acts: Mapping[str, float] = field(default_factory=lambda: dict(ACTS))
    callers: list[Process] = field(default_factory=list)
    workers: list[Process] = field(default_factory=list)
    books: list[Path] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    async def open(self, workers: int = 2, callers: int = 2, sellers: int = 6) -> None:
        """Schema, stock, workers, callers; returns once something was sold and applied."""
        async with self.inventory:
            await self.inventory.create_schema()
            for _ in range(workers):
                self.add_worker()
            for merchant in MERCHANTS:
                opening = [Line(sku, SCARCE if sku == "scarce" else 10**6) for sku in self.skus]
                await self.inventory.stock.restock(opening, merchant=merchant, operation_id="opening")
        for _ in range(callers):
            self.add_caller(sellers)
        await self._until(lambda: all(path.exists() and b'"acked"' in path.read_bytes() for path in self.books), "first sale")

    def add_worker(self) -> Process:
        command = [sys.executable, "-c", "from inventory_sdk.cli import main; main()", "worker", "tests.faults.shop:inventory"]
        worker = Process(command, self.folder / f"worker-{len(self.workers)}.log", self.environment)
        self.workers.append(worker)
        worker.start()
        return worker

    def add_caller(self, sellers: int) -> Process:
        """A process that sells; started anew it goes on with other ids and a book of its own."""
        name = f"c{len(self.books)}"
        plan = self.folder / f"{name}.json"
        book = self.folder / f"{name}.book"
        settings = {
            "name": name, "book": str(book), "seed": self.seed * 1000 + len(self.books), "sellers": sellers,
            "merchants": MERCHANTS, "levels": list(self.levels), "acts": dict(self.acts), "skus": self.skus,
        }  # fmt: skip
        plan.write_text(json.dumps(settings))
        self.books.append(book)
        caller = Process([sys.executable, "-m", "tests.faults.caller", str(plan)], self.folder / f"{name}.log", self.environment)
        self.callers.append(caller)
        caller.start()
        return caller

    async def attack(self, faults: Mapping[str, Callable[[Stand, Step], Awaitable[None]]], gap: float = 0.7) -> None:
        """Carry the schedule out; then everything goes on for a moment unharmed."""
        steps = schedule(self.seed, sorted(faults), SECONDS, gap)
        print(f"seed {self.seed} (INVENTORY_TEST_FAULT_SEED replays it), {len(steps)} faults in {SECONDS:g} s:")
        began = time.monotonic()
        for step in steps:
            print(f"  {step.at:6.2f} s  {step.fault}  {step.victim:.2f} {step.length:.2f}")
            await asyncio.sleep(max(0.0, began + step.at - time.monotonic()))
            await faults[step.fault](self, step)
            self.done.append(step.fault)
        await asyncio.sleep(0.3)

    async def settled(self, loses: Sequence[str] = ()) -> Report:
        """Stop selling, let the ledger catch up, and count. ``loses`` as in ``auditor.audit``. Raises what is wrong."""
        began = time.monotonic()
        await asyncio.gather(*(caller.stop(PATIENCE) for caller in self.callers))
        print(f"callers ended after {time.monotonic() - began:.1f} s")
        books = await self._rest()
        print(f"settled after {time.monotonic() - began:.1f} s")
        report = audit(read_callers(path for path in self.books if path.exists()), books, loses)
        print(f"faults done: {len(self.done)}; {report}")
        wrong = report.wrong
        async with self.inventory:
            wrong = wrong + await self.inventory.ledger.verify()
            wrong += await against_redis(self.inventory, self._partitions(), books)
        assert not wrong, f"seed {self.seed}, {len(wrong)} findings:\n" + "\n".join(wrong[:20]) + "\n" + self.logs()
        assert sum(count for name, count in report.counts.items() if name.endswith("acknowledged")) > 20, f"too few sales: {report}"
        return report

    async def _rest(self) -> Books:
        """Until the ledger has applied everything, nothing is owed to Redis, and no short hold is left."""
        end = time.monotonic() + PATIENCE
        why: object = None
        while time.monotonic() < end:
            try:
                async with self.inventory:
                    await self.inventory.settled(timeout=5.0)
                    books = await self._read()
                    if not books.pending and not await self._due():
                        await self.inventory.settled(timeout=5.0)
                        return await self._read()
                    why = f"{books.pending} voids and credits are pending, or holds are due"
            except (InventoryError, OSError) as error:
                why = error
            await asyncio.sleep(0.1)
        raise AssertionError(f"seed {self.seed}: not settled within {PATIENCE:g} s: {why!r}\n{self.logs()}")

    async def _due(self) -> int:
        """Holds of the short kind that have not expired yet: their time is over within seconds, the others' in ten minutes."""
        count = 0
        for partition in self._partitions():
            client: Any = partition.wire.client
            now = (await partition.hello()).now_ms
            count += await client.zcount(partition.key("expiry"), 1, now + 60_000)
        return count

    async def _read(self) -> Books:
        engine = create_async_engine(self.direct)
        try:
            async with engine.connect() as connection:
                return await read_books(connection, tables(self.prefix))
        finally:
            await engine.dispose()

    def _partitions(self) -> Any:
        return self.inventory._engine().partitions  # the audit looks behind the public face

    async def _until(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {PATIENCE:g} s\n{self.logs()}")
            await asyncio.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(f"--- {each.log.name}\n{each.tail()}" for each in (*self.workers, *self.callers) if each.log.exists())

    def end(self) -> None:
        for each in (*self.callers, *self.workers):
            each.kill()


@asynccontextmanager
async def stand(redis: str, queue: str | None, database: str, folder: Path, name: str, **options: Any) -> AsyncIterator[Stand]:
    """On these servers; everything it made is removed."""
    seed = int(SEED) if SEED else random.randrange(1_000_000)
    async with AsyncExitStack() as stack:

        async def proxied(url: str) -> tuple[Proxy, str]:
            parts = urlsplit(url)
            proxy = await stack.enter_async_context(Proxy(parts.hostname or "127.0.0.1", parts.port or 5672))
            login = f"{parts.username}:{parts.password}@" if parts.password else f"{parts.username}@" if parts.username else ""
            return proxy, urlunsplit(parts._replace(netloc=f"{login}127.0.0.1:{proxy.port}"))

        redis_proxy, redis_url = await proxied(redis)
        database_proxy, database_url = await proxied(database)
        queue_proxy, queue_url = await proxied(queue) if queue is not None else (None, None)
        prefix = f"{name}_"
        inventory = Inventory(
            redis_url, queue=queue_url, database=database_url, merchant=None, namespace=name, partitions=PARTITIONS,
            table_prefix=prefix, metrics=(), redis_timeout=0.5,
        )  # fmt: skip
        variables = {
            "PYTHONPATH": str(ROOT),
            "INVENTORY_REDIS_URL": redis_url,
            "INVENTORY_QUEUE_URL": queue_url or "",
            "INVENTORY_DATABASE_URL": database_url,
            "INVENTORY_NAMESPACE": name,
            "INVENTORY_PARTITIONS": str(PARTITIONS),
            "INVENTORY_TEST_PREFIX": prefix,
        }
        here = Stand(
            inventory, folder, os.environ | variables, redis_proxy, queue_proxy, database_proxy, database, prefix, seed, **options
        )  # fmt: skip
        try:
            yield here
        finally:
            here.end()
            if queue is not None:
                direct = from_url(queue, name)
                await direct.start()
                for partition in range(PARTITIONS):
                    await direct.delete(partition)
                await direct.close()
