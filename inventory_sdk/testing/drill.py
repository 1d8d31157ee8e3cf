"""A fire drill: sell on a throw-away namespace of real servers, break one thing after another, count to the unit, say how it went."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

from inventory_sdk.errors import DurabilityNotReached, InventoryError, OutcomeUnknown, Overloaded
from inventory_sdk.inventory import Inventory
from inventory_sdk.model import Line, key_of
from inventory_sdk.testing import faults

UNITS: Final = 10_000
BUYERS: Final = 20
CALLS: Final = 60
"""Sales of one drill."""
SKU: Final = "drill"
MERCHANT: Final = "drill"
PATIENCE: Final = 60.0
"""Seconds after which a drill has failed."""
REDIS_TIMEOUT: Final = 0.5


@dataclass(frozen=True, slots=True)
class Finding:
    """One drill: ``subject`` was broken, ``story`` happened, within ``seconds``. ``wrong``: which promise did not hold, in words."""

    subject: str
    story: str
    seconds: float
    wrong: str = ""


@dataclass(slots=True)
class Sales:
    """What the buyers of one drill heard. Every id ends in ``sold``; the counts are errors that they met before."""

    sold: set[str] = field(default_factory=set)
    unconfirmed: int = 0
    waited: int = 0


Drill = Callable[["Stand"], Awaitable[str]]


class Stand:
    """The throw-away shop. ``sold`` has every operation id that was acknowledged so far."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.sold: set[str] = set()
        self._worker: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()

    async def start_worker(self) -> None:
        """Returns once it works."""
        working, self._stop = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            async with self.inventory.worker() as worker:
                await worker.ready()
                working.set()
                await self._stop.wait()

        self._worker = asyncio.create_task(work(), name="drill worker")
        ready = asyncio.create_task(working.wait())
        await asyncio.wait({self._worker, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._worker.done():
            await self._worker

    async def stop_worker(self, *, at_once: bool = False) -> None:
        """Gracefully, or ``at_once`` as if it were killed between two awaits."""
        if self._worker is None:
            return
        self._stop.set()
        if at_once:
            self._worker.cancel()
        await asyncio.wait([self._worker])
        if not self._worker.cancelled() and (error := self._worker.exception()) is not None:
            raise error
        self._worker = None

    async def sell(self, calls: int = CALLS) -> Sales:
        """So many sales of one unit by several buyers; each repeats its call, with the same id, until it is acknowledged."""
        sales = Sales()
        names = [uuid4().hex for _ in range(calls)]

        async def buyer(mine: list[str]) -> None:
            for name in mine:
                await self._buy(name, sales)

        async with asyncio.TaskGroup() as group:
            for first in range(BUYERS):
                group.create_task(buyer(names[first::BUYERS]))
        self.sold |= sales.sold
        return sales

    async def _buy(self, name: str, sales: Sales) -> None:
        while True:
            try:
                await self.inventory.stock.deduct([Line(SKU, 1)], merchant=MERCHANT, operation_id=name)
            except Overloaded as error:
                sales.waited += 1
                await asyncio.sleep(min(error.retry_after or 0.1, 0.5))
            except OutcomeUnknown:
                continue  # the same id is safe to send again
            except DurabilityNotReached:
                sales.unconfirmed += 1
                await asyncio.sleep(0.1)
            else:
                sales.sold.add(name)
                return

    async def audit(self) -> str:
        """What is wrong, in words: each sale is in the ledger once, Redis and ledger agree, the books add up."""
        inventory = self.inventory
        await inventory.settled(timeout=PATIENCE)
        level = await inventory.stock.level(SKU, merchant=MERCHANT)
        (row,) = await inventory.ledger.stock([key_of(MERCHANT, SKU)])
        wrong = list(await inventory.ledger.verify())
        missing = [name for name in self.sold if await inventory.ledger.operation(key_of(MERCHANT, name)) is None]
        if missing:
            wrong.append(f"{len(missing)} acknowledged sales are not in the ledger, {missing[0]} is one of them")
        if row.sold != len(self.sold):
            wrong.append(f"{len(self.sold)} were acknowledged, the ledger sold {row.sold}")
        if (level.available, level.reserved) != (row.available, row.reserved):
            wrong.append(f"Redis has {level.available} and {level.reserved} reserved, the ledger {row.available} and {row.reserved}")
        return "; ".join(wrong)


async def duplicates(stand: Stand) -> str:
    """One id from many tasks at once."""
    name = uuid4().hex
    answers = await asyncio.gather(
        *[stand.inventory.stock.deduct([Line(SKU, 1)], merchant=MERCHANT, operation_id=name) for _ in range(BUYERS)]
    )
    stand.sold.add(name)
    firsts = sum(not receipt.replayed for receipt in answers)
    return f"one id sent {BUYERS} times at once; {firsts} effect, {BUYERS - firsts} repeats got its receipt"


async def reply_lost(stand: Stand) -> str:
    """Redis did it, and nobody heard."""
    with faults.reply_lost(stand.inventory, times=3) as fault:
        sales = await stand.sell()
    return f"{fault.met} were lost; each caller of {len(sales.sold)} got its receipt, and each sale is there once"


async def redis_away(stand: Stand) -> str:
    """Nobody reaches Redis for a second."""
    with faults.redis_away(stand.inventory) as fault:
        selling = asyncio.create_task(stand.sell())
        await asyncio.sleep(1.0)
    sales = await selling
    return f"for a second, met {fault.met} times; callers waited, {len(sales.sold)} sales went through"


async def queue_away(stand: Stand) -> str:
    """No confirm for a second."""
    with faults.queue_away(stand.inventory) as fault:
        selling = asyncio.create_task(stand.sell())
        await asyncio.sleep(1.0)
    sales = await selling
    return f"for a second, met {fault.met} times; {sales.unconfirmed} calls were told so, repeated and confirmed"


async def database_away(stand: Stand) -> str:
    """The worker can't write for a second."""
    with faults.database_away(stand.inventory) as fault:
        sales = await stand.sell()
        await asyncio.sleep(1.0)
    return f"for a second, met {fault.met} times; {len(sales.sold)} sales went on and were applied afterwards"


async def commit_unheard(stand: Stand) -> str:
    """A transaction was committed and its answer lost."""
    with faults.commit_unheard(stand.inventory, times=3) as fault:
        while fault.met < 3:
            await stand.sell(BUYERS)
            await stand.inventory.settled(timeout=PATIENCE)
    return f"the answers of {fault.met} were lost; nothing was applied twice"


async def worker_killed(stand: Stand) -> str:
    """The worker stops dead in the middle of its work, five times."""
    for _ in range(5):
        selling = asyncio.create_task(stand.sell())
        await asyncio.sleep(0.02)
        await stand.stop_worker(at_once=True)
        await selling
        await stand.start_worker()
    return "five times while selling; its successor went on where the ledger stood"


async def redis_emptied(stand: Stand) -> str:
    """All that this namespace has in Redis is gone, after the ledger or the queue had it."""
    await stand.sell(BUYERS)
    if not stand.inventory._ready().queue.confirms:
        await stand.inventory.settled(timeout=PATIENCE)  # at durability redis, only what was applied survives this
    gone = await faults.empty_redis(stand.inventory)
    sales = await stand.sell()
    return f"of {gone} keys; rebuilt from the ledger, callers were asked to wait {sales.waited} times"


DRILLS: Final[tuple[tuple[str, Drill], ...]] = (
    ("duplicates", duplicates),
    ("lost replies", reply_lost),
    ("Redis away", redis_away),
    ("queue away", queue_away),
    ("database away", database_away),
    ("unheard commits", commit_unheard),
    ("worker killed", worker_killed),
    ("Redis emptied", redis_emptied),
)


async def run(redis: str, queue: str | None, database: str) -> AsyncIterator[Finding]:
    """Every drill on these servers, one finding each, as they come. Only keys, queues and tables of a name made up for this run
    are touched, and they are removed at the end."""
    async with _throw_away(redis, queue, database) as stand:
        for subject, drill in DRILLS:
            if drill is queue_away and not stand.inventory._ready().queue.confirms:
                yield Finding(subject, "no queue is configured; the journal in Redis is read directly", 0.0)
                continue
            started = time.monotonic()
            story = wrong = ""
            try:
                async with asyncio.timeout(PATIENCE):
                    story = await drill(stand)
                    wrong = await stand.audit()
            except TimeoutError:
                wrong = f"not over after {PATIENCE:g} s"
            except (InventoryError, OSError) as error:
                wrong = f"{type(error).__name__}: {error}"
            yield Finding(subject, story, time.monotonic() - started, wrong)
            if wrong:
                return  # the counts of what follows would only repeat it


@asynccontextmanager
async def _throw_away(redis: str, queue: str | None, database: str) -> AsyncIterator[Stand]:
    name = f"drill{uuid4().hex[:10]}"
    inventory = Inventory(
        redis, queue=queue, database=database, namespace=name, table_prefix=f"{name}_", metrics=[], redis_timeout=REDIS_TIMEOUT
    )
    async with inventory:
        try:
            await inventory.create_schema()
            stand = Stand(inventory)
            await stand.start_worker()
            try:
                await inventory.stock.restock([Line(SKU, UNITS)], merchant=MERCHANT, operation_id="opening")
                yield stand
            finally:
                await stand.stop_worker()
        finally:
            await _remove(inventory)


async def _remove(inventory: Inventory) -> None:
    running = inventory._running()
    await faults.empty_redis(inventory)
    for partition in running.engine.partitions:
        await running.client.delete(partition.key("worker"))
        await running.queue.delete(partition.number)
    ledger: Any = inventory.ledger
    async with ledger.engine.begin() as connection:
        await connection.run_sync(ledger.tables.metadata.drop_all)
