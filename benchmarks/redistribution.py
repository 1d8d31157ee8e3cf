"""Many triggers, one heavy calculation, and buyers beside them: ``python -m benchmarks.redistribution``.

25 triggers fire ``--rate`` events a second on ``--shops`` shops, whose calculation takes about 10 ms of CPU; 8 buyers make core calls
with pauses. Loads: buyers alone (quiet); with our coalescing; with a debounce by hand (a timer per shop and a process pool, as one
writes it); with one calculation per trigger in the same pool; buyers beside a neighbour that never stops computing (what that costs
them without any redistribution), and ours beside it.
Staleness: from a trigger to the end of the first run that began after it. Core calls are measured twice: from their beginning, and
from when their buyer's pause was over (``_from_due``), which counts what the event loop was late.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import sys
import tempfile
import time
import uuid
from array import array
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.load import finish
from benchmarks.options import DATABASE, REDIS
from inventory_sdk import LaneFull, Line

BUYERS: Final = 8
PAUSE: Final = 0.005
TICK: Final = 0.001
UNITS: Final = 10**8
DRAIN: Final = 30.0
"""Seconds that a load gets to catch up after the last trigger."""
DEBOUNCE: Final = 0.2

Fire = Callable[[int, str], Any]
"""(number of the trigger, shop)"""


@dataclass
class Seen:
    """One load: when and for which shop each trigger was; seconds of each core call, from its beginning and from when it was due; what
    the governor allowed at the least."""

    fired: array[float] = field(default_factory=lambda: array("d"))  # no object each: the garbage collector is not to look at them
    shops: list[str] = field(default_factory=list)
    core: array[float] = field(default_factory=lambda: array("d"))
    from_due: array[float] = field(default_factory=lambda: array("d"))
    refused: int = 0
    share: float = 1.0
    cpu_seconds: float = 0.0
    seconds: float = 0.0


def percentile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else 0.0


class Log:
    """The runs, as the calculation wrote them down."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def runs(self) -> dict[str, list[tuple[float, float]]]:
        """(start, end) by shop, since the last ``forget``."""
        found: dict[str, list[tuple[float, float]]] = {}
        for line in self._lines()[self._read :]:
            shop, began, ended, _ = line.split()
            found.setdefault(shop, []).append((float(began), float(ended)))
        return {shop: sorted(each) for shop, each in found.items()}

    def forget(self) -> None:
        self._read = len(self._lines())

    def _lines(self) -> list[str]:
        return self._path.read_text(encoding="ascii").splitlines() if self._path.exists() else []


def staleness(seen: Seen, runs: dict[str, list[tuple[float, float]]], now: float) -> tuple[list[float], int]:
    """Seconds per trigger, and for how many no run came; those count until now."""
    ages, lost = [], 0
    for at, shop in zip(seen.fired, seen.shops, strict=True):
        of_shop = runs.get(shop, [])
        index = bisect_left(of_shop, (at, 0.0))
        if index == len(of_shop):
            lost += 1
            ages.append(now - at)
        else:
            ages.append(of_shop[index][1] - at)
    return ages, lost


async def caught_up(seen: Seen, log: Log) -> None:
    """Until every trigger was followed by a run, or for as long as a load gets."""
    last = dict(zip(seen.shops, seen.fired, strict=True))
    until = time.monotonic() + DRAIN
    while time.monotonic() < until:
        runs = log.runs()
        if all(runs.get(shop, [(0.0, 0.0)])[-1][0] >= at for shop, at in last.items()):
            return
        await asyncio.sleep(0.1)


class Bench:
    """The loads, on one shop."""

    def __init__(self, shop: Any, log: Log, seconds: float, rate: int, shops: int) -> None:
        self.shop, self.log, self.seconds, self.rate = shop, log, seconds, rate
        self.shops = [f"shop-{number}" for number in range(shops)]
        self._orders = count()
        self.sold = 0

    async def load(self, fire: Fire | None, *, drain: bool = True) -> Seen:
        """Buyers, and the triggers if there are any."""
        seen = Seen()
        self.log.forget()
        gc.collect()
        deadline = time.monotonic() + self.seconds
        spent, began = _cpu(), time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(BUYERS):
                group.create_task(self._buyer(number, deadline, seen))
            group.create_task(self._watch(deadline, seen))
            if fire is not None:
                group.create_task(self._fire(fire, deadline, seen))
        seen.seconds = time.monotonic() - began
        seen.cpu_seconds = _cpu() - spent
        if fire is not None and drain:
            await caught_up(seen, self.log)
        return seen

    async def _buyer(self, number: int, deadline: float, seen: Seen) -> None:
        due = time.monotonic()
        while (began := time.monotonic()) < deadline:
            try:
                await self.shop.buy(f"shelf-{number}", f"o{next(self._orders)}")
            except LaneFull:
                seen.refused += 1
            else:
                self.sold += 1
                now = time.monotonic()
                seen.core.append(now - began)
                seen.from_due.append(now - due)
            due = time.monotonic() + PAUSE
            await asyncio.sleep(PAUSE)

    async def _watch(self, deadline: float, seen: Seen) -> None:
        while time.monotonic() < deadline:
            seen.share = min(seen.share, self.shop.inventory.redistribution.governor.share)
            await asyncio.sleep(0.1)

    async def _fire(self, fire: Fire, deadline: float, seen: Seen) -> None:
        dice = random.Random(7)
        tasks: set[asyncio.Task[None]] = set()
        began = time.monotonic()
        while (now := time.monotonic()) < deadline:
            for _ in range(min(500, int((now - began) * self.rate) - len(seen.fired))):
                shop = dice.choice(self.shops)
                seen.fired.append(time.monotonic())
                seen.shops.append(shop)
                made = fire(dice.randrange(25), shop)
                if made is not None:
                    task = asyncio.ensure_future(made)
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            await asyncio.sleep(TICK)
        if tasks:
            await asyncio.wait(tasks)

    def figures(self, seen: Seen) -> dict[str, float]:
        """For the JSON object."""
        runs = self.log.runs()
        ages, lost = staleness(seen, runs, time.monotonic())
        found: dict[str, float] = {
            "core_calls": len(seen.core),
            "core_refused": seen.refused,
            "core_p50_ms": round(percentile(seen.core, 0.5) * 1000, 3),
            "core_p99_ms": round(percentile(seen.core, 0.99) * 1000, 3),
            "core_p99_ms_from_due": round(percentile(seen.from_due, 0.99) * 1000, 3),
            "cpu_share": round(seen.cpu_seconds / seen.seconds / (os.cpu_count() or 1), 3),
        }
        if seen.fired:
            found |= {
                "triggers": len(seen.fired),
                "runs": sum(len(each) for each in runs.values()),
                "staleness_p50_s": round(percentile(ages, 0.5), 3),
                "staleness_p99_s": round(percentile(ages, 0.99), 3),
                "not_followed": lost,
                "governor_share_min": round(seen.share, 3),
            }
        return found


def _cpu() -> float:
    """CPU seconds of this process and of its children that run now, a neighbour's among them."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = 0.0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "stat").read_text(encoding="utf-8")
            except OSError:
                continue
            fields = text[text.rindex(")") + 2 :].split()
            if os.getpid() in (int(folder.name), int(fields[1])):
                total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def by_hand(pool: ProcessPoolExecutor, calculate: Callable[[str], None]) -> Fire:
    """As one writes it: a timer per shop that starts anew with each event, and a process pool."""
    timers: dict[str, asyncio.TimerHandle] = {}
    loop = asyncio.get_running_loop()

    def fire(_: int, shop: str) -> None:
        if shop in timers:
            timers[shop].cancel()
        timers[shop] = loop.call_later(DEBOUNCE, lambda: loop.run_in_executor(pool, calculate, shop))

    return fire


@asynccontextmanager
async def neighbour() -> AsyncIterator[None]:
    """A process of another service, so of another session, that never stops computing."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass", start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        await process.wait()


def a_pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


async def loads(bench: Bench, result: dict[str, Any], wrong: list[str]) -> None:
    """One after the other; what each saw goes into ``result``."""
    shop = bench.shop

    def ours(number: int, name: str) -> Awaitable[None]:
        called: Awaitable[None] = shop.triggers[number](name)
        return called

    async def put(what: str, fire: Fire | None, *, drain: bool = True) -> None:
        seen = await bench.load(fire, drain=drain)
        result[what] = bench.figures(seen)
        print(f"{what:<14} {result[what]}", flush=True)

    await shop.recalculate("warm")
    await put("quiet", None)
    await put("ours", ours)
    with a_pool() as pool:
        list(pool.map(shop.calculate, ["warm"] * 4))
        await put("by_hand", by_hand(pool, shop.calculate))
    with a_pool() as pool:
        list(pool.map(shop.calculate, ["warm"] * 4))
        loop = asyncio.get_running_loop()
        await put("each_trigger", lambda _, name: loop.run_in_executor(pool, shop.calculate, name) and None, drain=False)
        # What it has not begun is dropped; its processes must be gone before the next load.
        await asyncio.to_thread(pool.shutdown, wait=True, cancel_futures=True)
    await asyncio.sleep(1.0)
    async with neighbour():
        await put("neighbour_alone", None)
        await put("neighbour", ours)
    wrong += [
        f"{what}: {result[what]['not_followed']} triggers were not followed by a run"
        for what in ("ours", "neighbour")
        if result[what]["not_followed"]
    ]


async def main(redis: str, database: str, seconds: float, rate: int, shops: int) -> None:
    """All of it; the last line is the JSON object."""
    name = f"b{uuid.uuid4().hex[:10]}"
    result: dict[str, Any] = {"benchmark": "redistribution", "seconds": seconds, "rate": rate, "shops": shops}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs"
        os.environ |= {
            "INVENTORY_BENCH_NAME": name,
            "INVENTORY_BENCH_LOG": str(path),
            "INVENTORY_REDIS_URL": redis,
            "INVENTORY_DATABASE_URL": database,
        }
        from benchmarks import recalculation as shop

        bench = Bench(shop, Log(path), seconds, rate, shops)
        try:
            async with shop.inventory:
                await shop.inventory.create_schema()
                await shop.inventory.stock.restock_many(
                    [Line(f"shelf-{number}", UNITS) for number in range(BUYERS)], operation_id="opening"
                )
                await loads(bench, result, wrong)
                levels = await shop.inventory.stock.levels([f"shelf-{number}" for number in range(BUYERS)])
                left = sum(level.available for level in levels.values())
                if left != UNITS * BUYERS - bench.sold:
                    wrong.append(f"{bench.sold} sold of {UNITS * BUYERS}, and {left} are left")
                shown = shop.inventory.redistribution.triggers()[:3]
                print("dearest triggers:", *(f"{each.name} {each.calls} calls {each.cpu_seconds:.2f} s CPU" for each in shown), sep="\n  ")
        finally:
            await _remove(redis, database, name, shop.inventory)
    quiet = result["quiet"]["core_p99_ms"]
    del result["neighbour"]["cpu_share"], result["neighbour_alone"]["cpu_share"]
    for what in ("by_hand", "each_trigger", "neighbour_alone", "neighbour"):
        result[what]["core_p99_ratio"] = round(result[what]["core_p99_ms"] / quiet, 2)
    alone = result["neighbour_alone"]["core_p99_ms"]
    result["neighbour"]["core_p99_ratio_to_neighbour_alone"] = round(result["neighbour"]["core_p99_ms"] / alone, 2)
    result |= {key: result["ours"][key] for key in ("triggers", "runs", "staleness_p99_s")}
    for what in ("ours", "by_hand", "each_trigger", "neighbour_alone", "neighbour"):
        result[what]["core_p99_ratio_from_due"] = round(result[what]["core_p99_ms_from_due"] / result["quiet"]["core_p99_ms_from_due"], 2)
    result["core_p99_ratio"] = round(result["ours"]["core_p99_ms"] / quiet, 2)
    finish(result, wrong)


async def _remove(redis: str, database: str, name: str, inventory: Any) -> None:
    engine = create_async_engine(database)
    client = Redis.from_url(redis)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(inventory.ledger.tables.metadata.drop_all)
        for pattern in (f"{{{name}:*", f"{name}:*"):
            async for key in client.scan_iter(match=pattern, count=1000):
                await client.unlink(key)
    finally:
        await engine.dispose()
        await client.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--redis", default=os.environ.get("INVENTORY_TEST_REDIS_URL", REDIS))
    parser.add_argument("--database", default=os.environ.get("INVENTORY_TEST_POSTGRESQL_URL", DATABASE))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load (default %(default)s)")
    parser.add_argument("--rate", type=int, default=5000, help="triggers a second (default %(default)s)")
    parser.add_argument("--shops", type=int, default=200, help="(default %(default)s)")
    given = parser.parse_args()
    asyncio.run(main(given.redis, given.database, given.seconds, given.rate, given.shops))
