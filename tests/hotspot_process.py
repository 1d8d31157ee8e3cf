"""Processes of the hotspot tests: ``python -m tests.hotspot_process {"mode": …}``; waits for a line on standard input, says what it
saw as one JSON line."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from inventory_sdk import Detection, Inventory, Line
from inventory_sdk.errors import InsufficientStock, OutcomeUnknown, Overloaded
from inventory_sdk.model import key_of

SKUS = ("a", "b")


def inventory(given: dict[str, Any], **options: Any) -> Inventory:
    return Inventory(
        given["redis"],
        database=given["database"],
        namespace=given["namespace"],
        table_prefix=f"{given['namespace']}_",
        metrics=[],
        merchant="m1",
        **options,
    )


async def spoken() -> str:
    """The next line of standard input."""
    return await asyncio.to_thread(sys.stdin.readline)


def say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def call(given: dict[str, Any]) -> None:
    """Calls a key at its own slow rate until it has heard that the key is hot, and how fast its calls go after that."""
    shop = inventory(given, detection=Detection(stay=60.0))
    heard = asyncio.Event()
    shop.on("hot")(lambda facts: heard.set() if facts["key"] == "flash" else None)

    @shop.hotspot(threshold=given["threshold"], limit=given["limit"], max_wait=5.0, keys="key")
    async def look(key: str) -> None: ...

    async with shop:
        for number in range(20):
            await look(f"warm-{number}")
        say({"ready": True})
        await spoken()
        began = time.time()
        pause = 1 / given["rate"]
        local = 0
        async with asyncio.timeout(30):
            while not heard.is_set():
                await look("flash")
                await look(f"other-{random.randrange(500)}")
                local += 1
                await asyncio.sleep(max(0.0, began + local * pause - time.time()))
        found = time.time()
        went = 0
        until = found + given["paced"]

        async def buyer() -> None:
            nonlocal went
            while time.time() < until:
                try:
                    await look("flash")
                    went += time.time() < until
                except Overloaded as full:
                    await asyncio.sleep(full.retry_after)

        await asyncio.gather(*(buyer() for _ in range(20)))
        say({"began": began, "seconds": found - began, "local": local, "went": went, "top": shop.hotspots.top(1)[0].key})


@dataclass
class Seen:
    """What a seller was told, in units per SKU."""

    sold: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SKUS, 0))
    held: list[str] = field(default_factory=list)
    short: int = 0
    busy: int = 0
    sides: dict[str, int] = field(default_factory=lambda: {"redis": 0, "database": 0})


async def sell(given: dict[str, Any]) -> None:
    """Buyers of two SKUs, together and alone, until the end is said; moves them to Redis and back so often if it is the mover."""
    shop = inventory(given, admission="auto", detection=Detection(stay=3600.0, promote="1000000/second"))
    seen = Seen()
    stopping = asyncio.Event()
    rng = random.Random(given["seed"])
    async with shop:
        await shop.create_schema()
        if not given["cycles"]:
            await run_sellers(shop, given, seen, stopping, rng, None)
        else:
            async with shop.worker():
                await run_sellers(shop, given, seen, stopping, rng, move(shop, given["cycles"]))
                await asyncio.to_thread(sys.stdin.readline)
                await shop.settled()
    say({"sold": seen.sold, "short": seen.short, "busy": seen.busy, "sides": seen.sides, "held": len(seen.held)})


async def move(shop: Inventory, cycles: int) -> None:
    promotion = shop.hotspots.here().promotion
    assert promotion is not None
    for cycle in range(cycles):
        await insist(lambda cycle=cycle: shop.stock.restock([Line(sku, 10) for sku in SKUS], operation_id=f"po-{cycle}"))
        await insist(lambda: promotion.promote([key_of("m1", "a")]))
        await asyncio.sleep(0.01)
        while not await insist(lambda: promotion.demote([key_of("m1", "a")])):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.01)
        if b_is_left := [key for key in promotion._detector.promoted if key.endswith("b")]:
            await insist(lambda: promotion.demote(b_is_left))  # called at once


async def insist(act: Any) -> Any:
    while True:
        try:
            return await act()
        except (Overloaded, OutcomeUnknown):
            await asyncio.sleep(0.01)


async def run_sellers(shop: Inventory, given: dict[str, Any], seen: Seen, stopping: asyncio.Event, rng: random.Random, moves: Any) -> None:
    say({"ready": True})
    await spoken()
    buyers = [asyncio.create_task(buy(shop, f"{given['name']}-{number}", seen, stopping, rng)) for number in range(given["buyers"])]
    try:
        if moves is not None:
            await moves
            say({"moved": True})
        await spoken()
    finally:
        stopping.set()
        await asyncio.gather(*buyers)


async def buy(shop: Inventory, name: str, seen: Seen, stopping: asyncio.Event, rng: random.Random) -> None:
    number = 0
    while not stopping.is_set():
        number += 1
        lines = [Line(sku, rng.randrange(1, 3)) for sku in rng.choice((("a",), ("a",), ("b",), ("a", "b")))]
        way = rng.random()
        operation = f"{name}-{number}"
        try:
            if way < 0.5:
                receipt = await insist_on_answer(seen, lambda o=operation, k=lines: shop.stock.deduct(k, operation_id=o))
            else:
                receipt = await insist_on_answer(seen, lambda o=operation, k=lines: shop.stock.reserve(k, operation_id=o, ttl=600))
                ending = shop.stock.confirm if way < 0.8 else shop.stock.release
                await insist_on_answer(seen, lambda o=operation, e=ending: e(o))
            if way < 0.8:
                for line in lines:
                    seen.sold[line.sku] += line.quantity
            seen.sides["redis" if receipt.positions[0].epoch else "database"] += 1
        except InsufficientStock:
            seen.short += 1
        await asyncio.sleep(0.002)


async def insist_on_answer(seen: Seen, act: Any) -> Any:
    """Until it is done or refused for good: what may be repeated is, under the same id."""
    while True:
        try:
            return await act()
        except (Overloaded, OutcomeUnknown):
            seen.busy += 1
            await asyncio.sleep(0.01)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    asyncio.run(call(asked) if asked["mode"] == "call" else sell(asked))
