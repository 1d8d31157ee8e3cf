"""Hours of load, or seconds of it: does anything grow that should not? Caller, worker, Redis and lag, sampled once a second.

Paced callers sell, reserve, confirm, release and let holds expire at durability ``queue``, with a results window and a journal cap
so small that both turn many times within the run. The first quarter warms up. Of the rest, the last third is held against the
first: memory of caller and worker, memory of the Redis keys, and how far the ledger is behind. The books are checked at the end.
The last line is a JSON object; exit code 1 if something grew or the books don't agree.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.load import finish
from benchmarks.options import Options, parse
from benchmarks.stand import MERCHANT, SKU, UNITS, Stand, stand
from inventory_sdk import DurabilityNotReached, InventoryError, Line, Receipt
from inventory_sdk.errors import Overloaded
from inventory_sdk.model import key_of

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
MIB: Final = 1024 * 1024
PACE: Final = 0.004
"""Seconds that a caller waits between two acts: the load is less than what the worker can apply."""
SLACK: Final = 6.0
"""MiB that a process may be larger by chance: allocators, a batch under way."""
CAP: Final = 4000
HELD: Final = 0.5
"""Seconds that a hold lasts that nobody ends."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One second. Memory in MiB, ``journal`` and ``lag`` in entries."""

    at: float
    caller: float
    worker: float
    redis: float
    journal: int
    lag: int


def resident(pid: int | str) -> float:
    """MiB of a process' memory that are in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / MIB


async def sample(stand: Stand, at: float) -> Sample:
    """What everything takes now."""
    (partition,) = stand.inventory._engine().partitions
    client: Any = partition.wire.client
    sizes = [int(await client.memory_usage(key, samples=50) or 0) for key in partition.keys]
    hello = await partition.hello()
    row = await stand.inventory.ledger.partition(0)
    lag = hello.sequence - (row.applied if row is not None else 0)
    return Sample(at, resident("self"), resident(stand.worker_pid), sum(sizes) / MIB, hello.entries, lag)


class Load:
    """``units``: what was sold for good. ``refused``: calls that back-pressure turned away; ``weaker``: stood below ``queue``."""

    def __init__(self, stand: Stand, until: float) -> None:
        self._stock = stand.inventory.stock
        self._until = until
        self.operations = 0
        self.units = 0
        self.refused = 0
        self.weaker = 0

    async def caller(self, number: int) -> None:
        """One buyer after the other."""
        chance = random.Random(number)
        count = 0
        line = [Line(SKU, 1)]
        while time.monotonic() < self._until:
            count += 1
            name = f"{number}-{count}"
            act = chance.choice(("deduct", "deduct", "confirm", "release", "expire"))
            try:
                if act == "deduct":
                    await self._stands(self._stock.deduct(line, operation_id=name))
                    self.units += 1
                else:
                    await self._stands(self._stock.reserve(line, operation_id=name, ttl=HELD if act == "expire" else 60))
                    self.operations += 1
                    if act == "confirm":
                        await self._stands(self._stock.confirm(name))
                        self.units += 1
                    elif act == "release":
                        await self._stands(self._stock.release(name))
                self.operations += 1
            except Overloaded as error:
                self.refused += 1
                await asyncio.sleep(error.retry_after)
            await asyncio.sleep(PACE * chance.uniform(0.5, 1.5))

    async def _stands(self, call: Awaitable[Receipt]) -> None:
        """A confirm that came too late (a busy RabbitMQ) is counted: the operation stands all the same."""
        try:
            await call
        except DurabilityNotReached:
            self.weaker += 1


def grown(samples: Sequence[Sample]) -> list[str]:
    """What is larger at the end than it was after the warm-up, in words."""
    kept = samples[len(samples) // 4 :]
    third = max(1, len(kept) // 3)
    first, last = kept[:third], kept[-third:]
    wrong = []
    for name, factor, slack in (
        ("caller", 1.05, SLACK), ("worker", 1.05, SLACK), ("redis", 1.5, 1.0), ("journal", 1.5, CAP / 4), ("lag", 2.0, CAP / 4),
    ):  # fmt: skip
        before = max(getattr(each, name) for each in first)
        after = max(getattr(each, name) for each in last)
        if after > before * factor + slack:
            wrong.append(f"{name} grew from {before:.1f} to {after:.1f}")
    return wrong


async def run(options: Options) -> None:
    """Load, samples, verdict."""
    window = max(1.0, options.seconds / 12)
    os.environ |= {"INVENTORY_BENCH_WINDOW": str(window), "INVENTORY_BENCH_CAP": str(CAP)}
    samples: list[Sample] = []
    async with stand(options) as (here, _):
        began = time.monotonic()
        load = Load(here, began + options.seconds)
        async with asyncio.TaskGroup() as group:
            for number in range(options.callers[0]):
                group.create_task(load.caller(number))
            while time.monotonic() < began + options.seconds:
                samples.append(await sample(here, time.monotonic() - began))
                latest = samples[-1]
                print(
                    f"{latest.at:7.0f} s  caller {latest.caller:6.1f}  worker {latest.worker:6.1f}  Redis {latest.redis:6.2f} MiB  "
                    f"journal {latest.journal:6}  behind {latest.lag:5}",
                    flush=True,
                )
                await asyncio.sleep(min(1.0, max(0.0, began + options.seconds - time.monotonic())))
        wrong = grown(samples) + await books(here, load)
    last = samples[-1]
    result = {
        "seconds": options.seconds, "operations": load.operations, "tps": round(load.operations / options.seconds),
        "refused": load.refused, "below_level": load.weaker, "caller_mib": round(last.caller, 1), "worker_mib": round(last.worker, 1),
        "redis_mib": round(last.redis, 2), "redis_mib_most": round(max(each.redis for each in samples), 2),
        "journal_most": max(each.journal for each in samples), "lag_most": max(each.lag for each in samples),
        "results_window_s": window, "journal_cap": CAP,
    }  # fmt: skip
    finish(result, wrong)


async def books(here: Stand, load: Load) -> list[str]:
    """Callers, Redis and ledger, to the unit, once the short holds have expired."""
    for _ in range(200):
        with suppress(InventoryError):
            await here.settle()
            if not (await here.inventory.stock.level(SKU)).reserved:
                break
        await asyncio.sleep(0.1)
    await here.settle()
    level = await here.inventory.stock.level(SKU)
    (row,) = await here.inventory.ledger.stock([key_of(MERCHANT, SKU)])
    wrong = await here.inventory.ledger.verify()
    left = UNITS - load.units
    if not level.available == row.available == left or row.sold != load.units:
        wrong.append(f"{load.units} sold, so {left} left; Redis says {level}, the ledger {row}")
    return wrong


if __name__ == "__main__":
    asyncio.run(run(parse(__doc__, callers="32")))
