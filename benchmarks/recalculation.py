"""The shop of ``benchmarks.redistribution``: a heavy calculation, 25 places that cause it, and core calls beside it.

INVENTORY_BENCH_NAME names namespace and tables, INVENTORY_BENCH_LOG the file that gets one line per run: shop, start, end.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final

from benchmarks.options import DATABASE, REDIS
from inventory_sdk import Inventory, Lane, Line, RedistributionPolicy
from inventory_sdk.metrics import NoMetrics

NAME: Final = os.environ.get("INVENTORY_BENCH_NAME", "bench")
LOG: Final = os.environ.get("INVENTORY_BENCH_LOG", os.devnull)
TRIGGERS: Final = 25
TURNS: Final = 110_000
"""Of the calculation's loop: about 10 ms of CPU."""

inventory = Inventory(
    os.environ.get("INVENTORY_REDIS_URL", REDIS),
    database=os.environ.get("INVENTORY_DATABASE_URL", DATABASE),
    namespace=NAME,
    table_prefix=f"{NAME}_",
    lanes={"core": Lane(timeout=30.0)},
    redistribution=RedistributionPolicy(cpu_budget=0.25, slows=("core",), nice=19),
    metrics=[NoMetrics()],
)


def calculate(shop: str) -> None:
    """Redistribute one shop's stock: all CPU, as the real thing is."""
    began = time.monotonic()
    total = 0.0
    for turn in range(TURNS):
        total += math.sqrt(turn)
    note = f"{shop} {began} {time.monotonic()} {total:.0f}\n".encode()
    log = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(log, note)
    finally:
        os.close(log)


@inventory.coalesce(key="{shop}", debounce=0.2, max_wait=2.0, executor="process", timeout=30)
async def recalculate(shop: str) -> None:
    """Ours."""
    calculate(shop)


def _place(number: int) -> Callable[[str], Awaitable[None]]:
    async def event(shop: str) -> None:
        """What a trigger's function does itself: next to nothing."""

    event.__qualname__ = f"event_{number}"  # each is a place of its own
    return inventory.trigger(f"place_{number}", runs=recalculate)(event)


triggers = [_place(number) for number in range(TRIGGERS)]


@inventory.lane("core")
async def buy(shelf: str, order: str) -> None:
    """A core call."""
    await inventory.stock.deduct([Line(shelf, 1)], operation_id=order)
